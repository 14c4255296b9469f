# SPDX-License-Identifier: MIT
"""FID, sFID, Inception Score, precision and recall as ADM's TensorFlow evaluator computes them, in PyTorch.

    torchrun --nproc_per_node=8 evaluate.py --ckpt runs/NAME/checkpoints/0400000.pt --ref REF
    python evaluate.py --samples SAMPLES --ref REF          # an .npz, or a folder of images
    python evaluate.py --make-ref IMAGES --out ref.npz      # a reference of your own images

    FID, sFID   |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of the pooled and the spatial features
    IS          exp(mean of sum p (log p - log mean p)), the mean over splits of 5,000 samples
    precision   share of samples within the k-NN radius of a reference image, k = 3
    recall      share of reference images within the k-NN radius of a sample

REF is VIRTUAL_imagenet256_labeled.npz of openai/guided-diffusion, as in DiT, SiT, REPA and HASTE. --ckpt
draws PNGs into a folder, only those that are missing, and measures it. The same command resumes.

What moves a FID: the sampler, its steps and guidance; the number of samples (a CIFAR-10 model had 5.12 with
50,000 and 9.75 with 5,000: github.com/atong01/conditional-flow-matching/issues/111); JPEG; --balanced, by
about -0.1; a resize with half-pixel centres, from 3.943 to 3.941; TF32, from 46.830 to 46.788. ADM computes
precision and recall in fp16, which adds about 0.001 and 0.0025.

Sections 1 to 5 are the evaluation. Sections 6 to 8 are --demo, --bench and --demo --compare of haste.py.
"""
import copy
import gc
import itertools
import json
import math
import shlex
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import normalize
from torchvision.utils import save_image
from tqdm import tqdm

import haste
from haste import DEVICE, RANK, WORLD, UserError

POOL, SPATIAL, LOGITS, SPLIT, NEIGHBOURS = 2048, 2023, 1008, 5000, 3
MAX_REFERENCES = 10_000         # images that --make-ref stores for precision and recall
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"


# ---- 1. The network: the Inception of 2015-12-05 -----------------------------------------------------------

def tf1_resize(x, size=299):
    """x (B, C, H, W) float -> (B, C, 299, 299): TensorFlow 1's bilinear, with neither half-pixel centres nor
    aligned corners. As gathers, along x and then along y, it equals TensorFlow's to the bit."""
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * float(np.float32(n / size))
        low = at.floor().long()
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * (at - low).view(-1, *[1] * (3 - dim))
    return x

def without_padding(branch, args):
    """TensorFlow's average pool does not count the padding; timm's does, in front of this branch."""
    counted = F.avg_pool2d(torch.ones_like(args[0][:1, :1]), 3, 1, 1)
    return args[0] / counted


class Inception(nn.Module):
    """images (B, 3, H, W) uint8 -> pool (B, 2048), spatial (B, 2023), logits (B, 1008) without bias, in fp32.
    weights: a file with the converted weights, "random", or None to download them. Raises UserError."""

    def __init__(self, weights=None):
        super().__init__()
        with torch.device("meta"):      # no time is lost on weights that are overwritten
            net = timm.create_model("inception_v3", pretrained=False, num_classes=LOGITS, aux_logits=False)
        if weights == "random":
            randomise(net)
        else:
            load_weights(net, weights)
        net.eval()
        for m in net.modules():         # batch norm becomes a part of the convolution before it
            if hasattr(m, "bn"):
                m.conv, m.bn = fuse_conv_bn_eval(m.conv, m.bn), nn.ReLU(inplace=True)
        for name in "5b 5c 5d 6b 6c 6d 6e 7b".split():
            getattr(net, f"Mixed_{name}").branch_pool.register_forward_pre_hook(without_padding)
        saved = self.saved = {}             # Mixed_7c pools its input, and in TensorFlow by the maximum
        net.Mixed_7c.register_forward_pre_hook(lambda block, args: saved.update(x=args[0]))
        net.Mixed_7c.branch_pool.register_forward_pre_hook(lambda *_: F.max_pool2d(saved.pop("x"), 3, 1, 1))
        net.Mixed_6d.register_forward_hook(lambda block, args, out: saved.update(spatial=out[:, :7]))
        self.net = net.requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images):
        x = (tf1_resize(images.float()) - 128) / 128
        pool = self.net.forward_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        spatial = self.saved.pop("spatial").permute(0, 2, 3, 1).flatten(1)       # height, width, channel
        return pool, spatial, pool @ self.net.fc.weight.T


def load_weights(net, path):
    with haste.explained(f"the FID Inception's weights could not be loaded from {path or WEIGHTS_URL}; "
                         f"without internet, get that file and use --inception FILE, or --inception random"):
        state = torch.load(path, map_location="cpu", weights_only=True) if path else \
            torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True)
        net.load_state_dict(state, assign=True)

def randomise(net):
    """Weights of a fixed seed that keep activations alive: He's; one pass over noise sets batch norm."""
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(2015)
        for m in net.to_empty(device="cpu").modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(m.weight)
            if isinstance(m, nn.BatchNorm2d):
                m.reset_parameters()
                m.momentum = 1.0
        nn.init.zeros_(net.fc.bias)
        net.train()(F.interpolate(torch.rand(4, 3, 38, 38) * 2 - 1, 299, mode="bilinear"))


# ---- 2. The metrics ----------------------------------------------------------------------------------------

def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64, device=DEVICE)


class Moments:
    """Mean and covariance of features (B, d) that come in batches, as sums in fp64."""

    def __init__(self, d):
        self.sums = zeros(d + 1, d + 1)     # of x x^T, where x has a one at its end

    def add(self, x):
        x = F.pad(x.double(), (0, 1), value=1.0)
        self.sums.addmm_(x.T, x)

    def statistics(self):
        n = self.sums[-1, -1]
        mean = self.sums[-1, :-1] / n
        return mean, (self.sums[:-1, :-1] - n * torch.outer(mean, mean)) / (n - 1)


# |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 sum_i sqrt(lambda_i)
#          with lambda the eigenvalues of R^T S_2 R, and S_1 = R R^T
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """mu (d,), sigma (d, d) of two Gaussians, in fp64. R^T S_2 R has the eigenvalues of S_1 S_2 and is
    symmetric, so that this is exact where S_1, of few samples, lacks full rank; sqrtm(S_1 S_2) is not."""
    w, V = torch.linalg.eigh(sigma1)
    positive = w > w[-1] * len(w) * torch.finfo(w.dtype).eps        # the rank, small where images are few
    R = V[:, positive] * w[positive].sqrt()
    roots = torch.linalg.eigvalsh(R.T @ sigma2 @ R).clamp(min=0).sqrt()
    return (((mu1 - mu2) ** 2).sum() + sigma1.trace() + sigma2.trace() - 2 * roots.sum()).item()


class InceptionScore:
    """exp(mean of sum p (log p - log mean p)) over each split of 5,000 of n samples, and then their mean."""

    def __init__(self, n):
        self.sums = zeros(math.ceil(n / SPLIT), LOGITS + 2)     # of p, sum p log p, 1

    def add(self, rows, logits):
        """logits (B, 1008) of the samples with these numbers."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        terms = torch.cat([p, (p * log_p).sum(1, keepdim=True)], dim=1)
        split = torch.tensor(rows, device=DEVICE) // SPLIT
        self.sums.index_add_(0, split, F.pad(terms, (0, 1), value=1.0))

    def score(self):
        mean = self.sums[:, :-1] / self.sums[:, -1:]
        p = mean[:, :-1]
        p_log_p = mean[:, -1]
        return (p_log_p - torch.xlogy(p, p).sum(1)).exp().mean().item()


def squared_distances(a, b):
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)

def knn_radii(x, block=2000):
    """The squared distance from each of x (n, d) to its third neighbour; the first in its row is itself."""
    parts = [squared_distances(part, x).kthvalue(NEIGHBOURS + 1).values for part in x.split(block)]
    return torch.cat(parts)

def share_within(x, centres, radii, block=2000):
    """The share of x (n, d) that lies within the squared radius of any of the centres (m, d)."""
    hits = [(squared_distances(part, centres) <= radii).any(1) for part in x.split(block)]
    return torch.cat(hits).double().mean().item()


# ---- 3. Images: of files, and drawn from a checkpoint ------------------------------------------------------

class Npz(Dataset):
    """arr_0 of an .npz, (n, H, W, 3) uint8. images[rows], (B, 3, H, W), is read when it is needed."""
    names = ()

    def __init__(self, path):
        self.path = path
        self.file = None
        with haste.explained(f"{path} is no folder and no .npz with arr_0, uint8 (n, H, W, 3)"):
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                np.lib.format.read_magic(file)
                self.shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                self.start = file.tell()
            if dtype != np.uint8 or self.shape[3:] != (3,) or fortran:
                raise ValueError(f"arr_0 is {dtype} {self.shape}, Fortran's order {fortran}")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        shape = len(rows), *self.shape[1:]
        with haste.explained(f"{self.path}: arr_0 is damaged near image {rows[0]}"):
            if not self.file:       # each loader process opens its own
                self.file = zipfile.ZipFile(self.path).open("arr_0.npy")
            self.file.seek(self.start + rows[0] * math.prod(shape[1:]))
            images = torch.frombuffer(bytearray(self.file.read(math.prod(shape))), dtype=torch.uint8)
            return images.view(shape).permute(0, 3, 1, 2)


class Folder(Dataset):
    """The images below a folder, all of one size. images[rows] is uint8 (B, 3, H, W)."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.shape = None
        self.names, others = haste.list_images(folder)
        if not self.names:
            raise UserError(f"{folder} holds no images")
        if others:
            print(f"{folder}: {len(others)} files are no images and left out: {', '.join(others[:3])}")
        self.shape = len(self.names), *self.read(self.names[0]).shape[1:], 3

    def __len__(self):
        return len(self.names)

    def __getitem__(self, rows):
        return torch.stack([self.read(self.names[i]) for i in rows])

    def read(self, name):
        path = self.folder / name
        with haste.explained(f"{path} cannot be read"), Image.open(path) as image:
            image = haste.to_tensor(haste.upright(image))
        if self.shape and image.shape[1:] != self.shape[1:3]:
            raise UserError(f"{path} has the size {[*image.shape[1:]]}, and {self.names[0]} "
                            f"{[*self.shape[1:3]]}: all must have one size, as --prepare writes into images/")
        return image


def split_rows(n, batch_size):
    return [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]

def open_images(path, optional=False):
    """(images, their statistics or None) of a folder, or of an .npz with ADM's keys. Raises UserError.
    optional: images may be None where there are statistics, {"fid": (mu, sigma), "sfid": (mu, sigma)}."""
    if Path(path).is_dir():
        images, statistics = Folder(path), None
    else:
        with haste.explained(f"{path} is no folder and no whole .npz"), np.load(path) as file:
            statistics = read_statistics(file) if "mu" in file else None
            no_images = optional and statistics and "arr_0" not in file
        images = None if no_images else Npz(path)
    if images and len(images) <= NEIGHBOURS:
        raise UserError(f"{path} holds {len(images)} images, and at least {NEIGHBOURS + 1} are needed")
    return images, statistics

def read_statistics(file):
    if "sigma_s" not in file:
        raise ValueError("it lacks sFID's mu_s and sigma_s. pytorch-fid and clean-fid write such files, but "
                         "resize images in another way: a FID against them is another number")
    statistics = {}
    for metric, end, d in (("fid", "", POOL), ("sfid", "_s", SPATIAL)):
        mu, sigma = (torch.from_numpy(file[key + end]).double().to(DEVICE) for key in ("mu", "sigma"))
        if (*mu.shape, *sigma.shape) != (d, d, d) or not (mu.sum() + sigma.sum()).isfinite():
            raise ValueError(f"mu{end} {[*mu.shape]}, sigma{end} {[*sigma.shape]} must be finite, of {d}")
        statistics[metric] = mu, sigma
    return statistics


class Samples:
    """A checkpoint's samples, as PNGs in a folder. Batch i is a function of (seed, i), on any number of
    processes. protocol, which FOLDER.json holds, is all that decides the samples. Raises UserError."""

    def __init__(self, args):
        self.args = args
        with haste.one_after_another():
            self.model, saved = haste.load_ema(args.ckpt, args.model)
            self.vae, self.scale = haste.load_decoder(saved["vae"], args.vae, self.model), saved["scale"]
            self.labels = self.choose_labels(args.num_samples, np.random.default_rng(args.seed))
        if args.compile:
            haste.compile_blocks(self.model)
        bits = sum(p.view(torch.int32).sum().item() for p in self.model.final_layer.parameters())
        self.protocol = {
            "EMA's checksum": bits, "seed": args.seed, "batch size": args.batch_size,
            "sampler": args.mode, "steps": args.num_steps, "arithmetic": args.precision,
            "guidance": args.cfg_scale, "interval": [args.guidance_low, args.guidance_high],
            "labels": args.captions_from or ("balanced" if args.balanced else "uniform at random"),
            "VAE": self.vae and self.vae.config["_name_or_path"]}
        path = Path(args.ckpt).absolute()
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        name = (f"{path.stem}-{args.mode}-{args.num_steps}-cfg-{args.cfg_scale:g}-in-{args.guidance_low:g}-"
                f"{args.guidance_high:g}-seed-{args.seed}-{args.num_samples}{'-balanced' * args.balanced}")
        self.folder = Path(args.out or run / "eval" / name)

    def choose_labels(self, n, rng):
        """For each of n samples its class, or its caption."""
        source, num_classes = self.args.captions_from, self.model.num_classes
        if isinstance(self.model, haste.MMDiT) != bool(source):
            raise UserError("--captions-from DIR is for an MMDiT, which draws the captions of that dataset")
        if source:
            data, self.model.null_label = haste.Data(source), haste.encode_captions([""])
            with haste.explained(f"--captions-from {source} has images without captions"):
                texts = [data.captions[name][0] for name in data.names]
            return np.resize(rng.permutation(texts), n)
        if self.args.balanced:      # in random order: sorted by class, they would spoil the splits of IS
            return rng.permutation(np.arange(n) % num_classes)
        return rng.integers(num_classes, size=n)

    @torch.no_grad()
    def draw(self, rows):
        """The samples with these numbers, uint8 (B, 3, H, W)."""
        args, y = self.args, self.labels[rows.start:rows.stop].tolist()
        y = haste.encode_captions(y) if args.captions_from else torch.tensor(y, device=DEVICE)
        key = np.random.SeedSequence((args.seed, rows.start)).generate_state(1).item()
        noise = haste.seeded_noise(self.model, len(rows), key)
        torch.manual_seed(key + 1)      # the SDE must not draw the same numbers again
        allow_tf32(True)
        interval = args.guidance_low, args.guidance_high
        with haste.autocast(args.precision):
            x = haste.sample(self.model, noise, y, args.num_steps, args.cfg_scale, interval, args.mode)
        return haste.to_images(x, self.vae, self.scale)

    def complete(self):
        """Draws the batches that lack a file, and returns the folder."""
        names = [f"{i:06d}.png" for i in range(self.args.num_samples)]
        present, record = set(haste.list_images(self.folder)[0]), Path(f"{self.folder}.json")
        missing = [rows for rows in split_rows(len(names), self.args.batch_size)
                   if not present.issuperset(names[rows.start:rows.stop])]
        before = haste.read_json(record).get("protocol", {}) if present else self.protocol
        if present.difference(names) or not self.protocol.items() <= before.items():
            raise UserError(f"{self.folder} has samples drawn by other flags or weights: delete it, or "
                            f"name another folder with --out")
        haste.barrier()         # all processes have looked before one writes
        if not present:
            write_json(record, {"protocol": self.protocol})
        with ThreadPoolExecutor(4) as pool:     # Pillow encodes on several cores
            for rows in tqdm(missing[RANK::WORLD], "drawing", unit=" batches", disable=RANK > 0):
                arrays = self.draw(rows).permute(0, 2, 3, 1).cpu().numpy()
                list(pool.map(write_png, [self.folder / names[i] for i in rows], arrays))
        haste.barrier()
        return self.folder


def write_png(path, array):
    with haste.replacing(path) as f:
        Image.fromarray(array).save(f, "PNG", compress_level=1)     # 5 ms for 256 x 256; level 6 takes 18

def write_json(path, content):
    if RANK == 0:
        with haste.replacing(path) as f:
            f.write(json.dumps(content, indent=1).encode())


# ---- 4. Measuring ------------------------------------------------------------------------------------------

def allow_tf32(allowed):
    """TF32 is fine for the networks that draw; features need fp32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed

def read_batches(images, ranges, workers):
    """Yields images[rows] for each of these ranges, from loader processes. Raises UserError."""
    loader = DataLoader(
        images, batch_size=None, sampler=ranges, num_workers=workers, timeout=workers and 300)
    with haste.explained("a loader failed; is shared memory short? use --shm-size 8g or --num-workers 0"):
        yield from loader

def measure(images, net, args, title, keep):
    """({"fid": (mu, sigma), "sfid": (mu, sigma)}, IS, the pooled features (n, 2048) or none) of images.
    Each process takes every WORLD-th batch."""
    n = len(images)
    ranges = split_rows(n, args.batch_size)[RANK::WORLD]
    pool, spatial, score = Moments(POOL), Moments(SPATIAL), InceptionScore(n)
    pooled = torch.zeros(n if keep else 0, POOL, device=DEVICE)
    allow_tf32(False)
    batches = zip(ranges, read_batches(images, ranges, args.num_workers))
    for rows, batch in tqdm(batches, title, len(ranges), unit=" batches", disable=RANK > 0):
        features, of_grid, logits = net(batch.to(DEVICE))
        pool.add(features)
        spatial.add(of_grid)
        score.add(rows, logits)
        if keep:
            pooled[rows.start:rows.stop] = features
    if dist.is_initialized():
        for x in (pool.sums, spatial.sums, score.sums, pooled):
            dist.all_reduce(x)
    return {"fid": pool.statistics(), "sfid": spatial.statistics()}, score.score(), pooled

def notes(args, samples, references, given):
    """Sentences on what makes these figures incomparable with published ones."""
    if not references:
        yield f"{args.ref} holds statistics but no images: precision and recall are left out"
    elif references.shape[1:] != samples.shape[1:]:
        yield f"samples have the size {samples.shape[1:3]}, and reference images {references.shape[1:3]}"
    if args.inception == "random":
        yield "the features are a random network's: figures compare only with one another"
    if given:
        yield f"FID and sFID are those of the mu and sigma in {args.samples}, as ADM takes them"
    elif len(samples) < 50_000:
        yield f"{len(samples):,} samples, and not 50,000: FID and sFID are too high, by a term in 1 / n"
    if any(name.lower().endswith((".jpg", ".jpeg")) for name in samples.names):
        yield "samples are JPEG files, which moves FID"
    if len(samples) > SPLIT and any("/" in name for name in samples.names):
        yield f"samples come folder by folder: if these are classes, IS over splits of {SPLIT:,} is too low"

def evaluate(args):
    """Measures args.ckpt or args.samples against args.ref; prints protocol and metrics, and returns these."""
    # --- mistakes in the reference, the samples and the checkpoint are found before the hours of sampling
    haste.join_processes(args)
    with haste.one_after_another():
        net = Inception(args.inception).to(DEVICE)
    if args.make_ref:
        return make_reference(args, net)
    references, reference = open_images(args.ref, optional=True)
    drawn = Samples(args) if args.ckpt else None
    samples, given = (None, None) if drawn else open_images(args.samples)
    keep = bool(references) and not args.no_prec_recall

    # --- features of the reference, then of the samples
    if keep or not reference:
        statistics, _, y = measure(references, net, args, "reference", keep)
        reference = reference or statistics
    if drawn:
        args.samples = str(drawn.complete())
        samples = Folder(args.samples)
    statistics, score, x = measure(samples, net, args, "samples", keep)
    if RANK > 0:
        return

    # --- the metrics, with their protocol and notes
    statistics = given or statistics
    results = {metric: frechet_distance(*statistics[metric], *reference[metric]) for metric in reference}
    results["is"] = score
    if keep:
        results["precision"] = share_within(x, y, knn_radii(y))
        results["recall"] = share_within(y, x, knn_radii(x))
    protocol = {
        "samples": args.samples, "number of samples": len(samples), "size": list(samples.shape[1:3]),
        "reference": args.ref, "features": args.inception or WEIGHTS}
    protocol |= drawn.protocol if drawn else {}
    report = results | {"protocol": protocol, "notes": [*notes(args, samples, references, given)]}
    for name, value in (protocol | results).items():
        print(f"{name:20} {value}")
    print(*(f"note: {note}" for note in report["notes"]), sep="\n")
    for path in filter(None, (args.json, drawn and f"{args.samples}.json")):
        write_json(path, report)
    return results

def make_reference(args, net):
    """--make-ref: ADM's keys, from images; arr_0 holds all of them, or 10,000 evenly spaced ones."""
    images, _ = open_images(args.make_ref)
    path = args.out or "ref.npz"
    count = min(len(images), MAX_REFERENCES)
    statistics, *_ = measure(images, net, args, "reference", keep=False)
    if RANK == 0:
        chosen = np.linspace(0, len(images) - 1, count).round().astype(int).tolist()
        arr_0 = [images[[i]][0].permute(1, 2, 0).numpy() for i in chosen]
        (mu, sigma), (mu_s, sigma_s) = ([x.cpu() for x in pair] for pair in statistics.values())
        with haste.replacing(path) as f:
            np.savez(f, arr_0=np.stack(arr_0), mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
        print(f"{path}: statistics of {len(images):,} images, and {count:,} of them")


# ---- 5. The command line -----------------------------------------------------------------------------------

FLAGS = f"""
what to measure, and against what
--ckpt str -                      draw samples from this checkpoint's EMA, then measure them
--samples str -                   measure an .npz with arr_0, or a folder of images
--make-ref str -                  write a reference of these images to --out
--ref str -                       an ADM .npz, or a folder of images
--out str -                       for --ckpt a folder (in the run's eval/), for --make-ref a file (ref.npz)
--json str -                      a file for the metrics and their protocol
--no-prec-recall switch -         leave precision and recall out
--inception str -                 a file of the FID Inception's weights (downloaded), or random to do without
--batch-size int 64               images at a time, in each process; it is a part of what --ckpt draws
what --ckpt draws
--num-samples --num-fid-samples int 50000     samples
--balanced switch -               the same number of each class, in random order
--captions-from str -             the prepared dataset with an MMDiT's captions
--model str SiT-XL/2              for a checkpoint that does not say
{haste.SAMPLER_FLAGS}"""


def main(argv=None):
    with haste.one_sentence("evaluate.py"):
        args = haste.parse("evaluate.py", FLAGS, argv)
        if sum(map(bool, (args.ckpt, args.samples, args.make_ref))) != 1 or not (args.ref or args.make_ref):
            raise UserError("use one of --ckpt, --samples and --make-ref; the first two need --ref")
        evaluate(args)


# ---- 6. The demo, haste.py --demo: letters, their teacher, and a classifier that reads samples -------------

LETTERS, SIDE, PATCH = "ABCEHKRSTX", 24, 4
TRAINING = "--model SiT-XS/4 --ema-decay 0.99 --log-every 50 --num-workers 0"
DEMO = ("--batch-size 48 --learning-rate 3e-3 --tau 350 --max-train-steps 700 --checkpointing-steps 350 "
        "--sampling-steps 350")
DRAWING = "--num-steps 30 --cfg-scale 3"


def draw_letters(n, seed):
    """n random letters: images (n, 3, 24, 24) uint8, labels (n,), and pixels (n, 24, 24): label + 1 or 0."""
    rng, images, pixels = np.random.default_rng(seed), [], []
    labels = rng.integers(len(LETTERS), size=n)
    for label in labels:
        layer = Image.new("L", (2 * SIDE, 2 * SIDE))        # drawn at twice the size, for smooth edges
        font, place = ImageFont.load_default(rng.uniform(38, 46)), SIDE + rng.uniform(-3, 3, 2)
        ImageDraw.Draw(layer).text(tuple(place), LETTERS[label], 255, font, anchor="mm", stroke_width=2)
        layer = layer.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
        mask = np.asarray(layer.resize((SIDE, SIDE), Image.Resampling.BOX)) / 255
        ground, ink = rng.uniform(0, 90, (3, 1, 1)), rng.uniform(140, 255, (3, 1, 1))
        images.append((ground + mask * (ink - ground)).astype(np.uint8))
        pixels.append((mask > 0.5) * (label + 1))
    return [torch.from_numpy(np.stack(x)) for x in (images, labels, pixels)]

def fit(net, loss_of, data, steps):
    """A few hundred steps of Adam on the CPU, enough for the demo's teacher and its classifier."""
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in tqdm(range(steps), desc="fitting", dynamic_ncols=True):
        i = torch.randint(len(data[0]), (64,))
        optimizer.zero_grad()
        loss_of(*(x[i] for x in data)).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)

def fit_teacher(path, images, pixels):
    """Writes a file for --teacher: a ViT of 4 blocks that learned to which letter each pixel belongs."""
    torch.manual_seed(0)
    config = dict(img_size=SIDE, patch_size=PATCH, embed_dim=96, depth=4, num_heads=4, num_classes=0)
    vit, head = VisionTransformer(**config), nn.Linear(96, PATCH ** 2 * (1 + len(LETTERS)))

    def pixel_loss(x, pixels):
        x = normalize(x / 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)         # as haste.Teacher does
        logits = head(vit.forward_features(x)[:, 1:])                               # (B, N, 16 x 11)
        target = F.pixel_unshuffle(pixels[:, None], PATCH).flatten(2).mT            # (B, N, 16)
        return F.cross_entropy(logits.view(target.numel(), -1), target.flatten())

    fit(nn.ModuleList([vit, head]), pixel_loss, (images, pixels), 250)
    with haste.replacing(path) as f:
        torch.save({"config": config, "model": vit.state_dict()}, f)

def fit_classifier():
    """A small convolutional network that neither teacher nor student meets, fitted to letters of its own."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 6, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, len(LETTERS)))
    return fit(net, lambda x, y: F.cross_entropy(net(x.float()), y), draw_letters(4000, seed=1)[:2], 300)

def share_read(classifier, images, labels):
    return (classifier(images.float()).argmax(1) == labels).double().mean().item()

def command(line, program="haste.py", flags=haste.FLAGS):
    """Prints a command, and returns the values of its flags."""
    print("\n$ python", program, line)
    return haste.parse(program, flags, shlex.split(line))

def prepare_letters(home):
    """Makes a dataset of letters and a teacher, and returns the flags that name them."""
    at = shlex.quote(str(home))
    print("drawing letters, and fitting the teacher to them")
    images, labels, pixels = draw_letters(4000, seed=0)
    for i, (image, label) in enumerate(zip(images, labels)):
        write_png(home / "letters" / LETTERS[label] / f"{i:04d}.png", image.permute(1, 2, 0).numpy())
    if not (home / "teacher.pt").is_file():
        fit_teacher(home / "teacher.pt", images, pixels)
    haste.prepare(command(f"--prepare {at}/letters --data-dir {at}/data --resolution {SIDE} --vae none"))
    return f"--data-dir {at}/data --teacher {at}/teacher.pt"

def draw_samples(args):
    """(images (n, 3, 24, 24) uint8, labels (n,)) that evaluate.py measures with these flags."""
    haste.join_processes(args)
    samples = Samples(args)
    return Folder(samples.complete())[range(args.num_samples)], torch.from_numpy(samples.labels)

def demo(argv):
    """haste.py --demo: draws letters, fits a teacher, runs ordinary commands. argv goes to the training."""
    args = haste.parse("haste.py", haste.FLAGS, argv)
    given = shlex.join(flag for flag in argv if flag not in ("--demo", "--compare"))
    if args.compare:
        return compare(args, given)
    home = Path(args.output_dir, args.exp_name or "demo")
    at = shlex.quote(str(home))
    data = prepare_letters(home)
    if code := haste.train(command(f"{data} --exp-name demo {TRAINING} {DEMO} {DRAWING} {given}")):
        return code
    classifier = fit_classifier()
    real, labels, _ = draw_letters(500, seed=2)
    print(f"\nthe classifier reads {share_read(classifier, real, labels):.0%} of real letters")
    np.savez(home / "real.npz", arr_0=real[:50].permute(0, 2, 3, 1))
    rows = [real[:20]]
    for path in sorted((home / "checkpoints").glob("[0-9]*.pt")):
        line = f"--ckpt {at}/checkpoints/{path.name} --num-samples 100 {DRAWING} --num-workers 0"
        args = command(f"{line} --ref {at}/real.npz --inception random", "evaluate.py", FLAGS)
        images, labels = draw_samples(args)
        print(f"the classifier reads {share_read(classifier, images, labels):.0%} at step {int(path.stem)}")
        rows.append(images[:20])
    evaluate(args)          # of the last checkpoint
    haste.sample_from(command(f"--sample {at}/checkpoints/{path.name} {DRAWING} --out {at}/samples.png"))
    with haste.replacing(home / "demo.png") as f:
        save_image(F.interpolate(torch.cat(rows) / 255, scale_factor=2), f, "png", nrow=20)
    print(f"{home}/demo.png has real letters in its first row, and each checkpoint's below")


# ---- 7. How fast a step is, haste.py --bench ---------------------------------------------------------------

class Plain(nn.Sequential):
    """A SiT or DiT with its forward pass as one writes it without alignment."""

    def forward(self, x, t, y):
        model = self[0]
        x = model.x_embedder(x) + model.pos_embed
        c = model.t_embedder(t) + model.y_embedder(y)
        for block in model.blocks:
            x, _ = block(x, c)
        return haste.unpatchify(model.final_layer(x, c), model.patch_size)


def count_tflop(call, *given):
    """What a call multiplies and adds; attention counts as two products of matrices."""
    counter = FlopCounterMode(display=False)
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
        call(*given)
    return counter.get_total_flops() / 1e12

def time_calls(call, *given):
    """Seconds of a call, and GiB of GPU memory at its peak. Two others come first: DDP builds its buckets in
    the second."""
    cuda = DEVICE.type == "cuda"
    n = 10 if cuda else 1
    synchronize = getattr(torch, DEVICE.type).synchronize
    for _ in range(2):
        call(*given)
    synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(n):
        call(*given)
    synchronize()
    return (time.perf_counter() - began) / n, torch.cuda.max_memory_allocated() / 2 ** 30

def bench_teacher(name, grid, blocks):
    with haste.one_after_another():
        try:
            teacher = haste.load_teacher(name, grid, blocks)
        except UserError as e:
            print(f"{e}: a ViT-B/14 with random weights takes its place")
            vit = VisionTransformer(img_size=14 * grid, patch_size=14, num_classes=0, init_values=1.0)
            teacher = haste.Teacher(vit, blocks, grid)
    return teacher.to(DEVICE)

def bench(args):
    """haste.py --bench: times training steps, plain, of phase I and of phase II, and the network in a
    sampler, on made-up batches, in turns, so that a noisy machine favours none."""
    haste.join_processes(args)
    kind, config, patch = haste.parse_name(args.model)
    if kind is haste.MMDiT:
        raise UserError("--bench times SiT and DiT: choose one with --model")
    B = args.batch_size // WORLD
    R, S = args.resolution, args.resolution // 8
    grid = S // patch
    teacher = bench_teacher(args.teacher, grid, config.teacher_blocks)
    with DEVICE:
        model = haste.build_model(args.model, input_size=S, teacher_dim=teacher.dim)
        x0, eps = torch.randn(2, B, 4, S, S)
        t, y = torch.rand(B), torch.randint(1000, (B,))
        images = torch.randint(256, (B, 3, R, R), dtype=torch.uint8)
    ema = copy.deepcopy(model)
    update_ema = torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=args.precision == "fp16")
    if args.compile:
        haste.compile_blocks(model)

    def run(row, net, n):
        """A training step, or an evaluation of the network as in a sampler, on n images."""
        with haste.autocast(args.teacher_precision):
            target = teacher(images[:n]) if row == "phase I" else None
        with haste.autocast(args.precision), torch.set_grad_enabled(row != "sampling"):
            if row == "sampling":
                return net(x0[:n], t[:n], y[:n])
            given = x0[:n], eps[:n], t[:n], y[:n], target, args.lambda_r, args.lambda_a
            parts = haste.losses(net, model.process, *given)
        scaler.scale(sum(parts)).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.found_inf = (~norm.isfinite()).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        update_ema([*ema.parameters()], [*model.parameters()], None)

    # --- the rounds, the first of which warms up
    times = {row: [] for row in ("plain", "phase II", "phase I", "sampling")}
    tflop, gib = {}, {}
    for _ in tqdm(range(6), desc="rounds", disable=RANK > 0):
        for row in times:
            model.projectors.requires_grad_(row == "phase I")
            net = Plain(model) if row == "plain" else model
            tflop[row] = tflop.get(row) or B * count_tflop(run, row, net, 1)
            if WORLD > 1:
                net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
            seconds, gib[row] = time_calls(run, row, net, B)
            times[row].append(seconds)
            net = None
            gc.collect()        # the hooks of DDP go with it
    # A step uses each weight of the projector three times: forward, for its gradient, for its input's.
    tokens = torch.zeros(grid ** 2, config.hidden_size, device=DEVICE)
    added = B * (count_tflop(teacher, images[:1]) + 3 * count_tflop(model.projectors[0], tokens))
    report_bench(args, times, tflop, gib, 1 + added / tflop["plain"])

def report_bench(args, times, tflop, gib, expected):
    """Prints the table, and writes it to args.json. expected: phase I over plain, by counted FLOP."""
    rows = {}
    for row, seconds in times.items():
        median = np.median(seconds[1:])
        rows[row] = {
            "ms": 1e3 * median, "images_per_sec": args.batch_size / median,
            "tflop_per_sec": tflop[row] / median, "gib": gib[row],
            "over_plain": np.median(np.divide(seconds, times["plain"])[1:]).item()}      # of neighbours
        print(f"{row:10}", *(f"{key} {value:<9.4g}" for key, value in rows[row].items()))
    ratios = {
        "phase2_over_plain": rows["phase II"]["over_plain"],
        "phase1_over_expected": rows["phase I"]["over_plain"] / expected}
    print(f"{args.model}, batch {args.batch_size} in {args.precision} on {WORLD} x {DEVICE.type}: {ratios}")
    if args.json:
        write_json(args.json, ratios | {"rows": rows, "flags": vars(args)})


# ---- 8. The paper's claims in small, haste.py --demo --compare ---------------------------------------------

# All start from the same weights, with the same batches and noise. "never" measures the angle as "auto" does,
# and ignores it: no cosine is below -1.
VARIANTS = {"plain": "--tau 0", "REPA": "--tau never --lambda-a 0", "attention": "--tau never --lambda-r 0",
            "never": "--tau auto --tau-cosine -1", "HASTE": "", "auto": "--tau auto"}
COMPARED = ("--batch-size 64 --learning-rate 2e-3 --max-train-steps 1500 --tau 750 --tau-from 150 "
            "--tau-every 150 --tau-images 256 --checkpointing-steps 300 --sampling-steps 0")
MEASURED = "--num-samples 1000 --mode heun --num-steps 13 --num-workers 0"


def feature_statistics(classifier, images):
    features = classifier[:-2](images.float()).double()         # (n, 64)
    return features.mean(0), features.T.cov()

def compare(args, given):
    """haste.py --demo --compare: trains VARIANTS one after another by ordinary commands, and measures samples
    of their checkpoints. What compare.json holds is not done again."""
    name = args.exp_name or "compare"
    home = Path(args.output_dir, name)
    path = home / "compare.json"
    flags = f"{prepare_letters(home)} {TRAINING} {COMPARED} {given}"
    protocol = vars(args) | {"seed": None, "seeds": None}
    results = haste.read_json(path) if path.is_file() else {"flags": protocol, "runs": {}}
    if results["flags"] != protocol:
        raise UserError(f"{path} compares with other flags: delete {home}, or name another --exp-name")
    classifier = fit_classifier()
    real, labels, _ = draw_letters(2000, seed=2)
    reference = feature_statistics(classifier, real[:1000])

    def measure_letters(images, labels):
        distance = frechet_distance(*feature_statistics(classifier, images), *reference)
        return distance, share_read(classifier, images, labels)

    results["real"] = measure_letters(real[1000:], labels[1000:])
    seeds = [str(seed) for seed in range(args.seed, args.seed + args.seeds)]
    for seed, variant in itertools.product(seeds, VARIANTS):
        runs = results["runs"].setdefault(variant, {})
        run = f"seed{seed}/{variant}"
        if seed in runs:
            continue
        training = command(f"{flags} {VARIANTS[variant]} --seed {seed} --exp-name {shlex.quote(name)}/{run}")
        if code := haste.train(training):
            return code
        measured, every = {}, training.checkpointing_steps
        for step in range(every, training.max_train_steps + 1, every):
            argv = ["--ckpt", f"{home}/{run}/checkpoints/{step:07d}.pt", "--seed", seed, *MEASURED.split()]
            samples = draw_samples(haste.parse("evaluate.py", FLAGS, argv))
            measured[step] = measure_letters(*samples)
        runs[seed] = measured
        write_json(path, results)
    report_comparison(home, haste.read_json(path), seeds)

def report_comparison(home, results, seeds):
    """Prints the table of means and standard deviations over the seeds, and draws the curves."""
    runs = results["runs"]
    steps = list(map(int, runs["plain"][seeds[0]]))
    x = np.array([[list(runs[variant][seed].values()) for seed in seeds] for variant in VARIANTS])
    mean = x.mean(1)                                            # (variants, steps, 2)
    deviation = x.std(1, ddof=min(1, len(seeds) - 1))
    print(f"\n| step | {' | '.join(VARIANTS)} |\n|{' --- |' * (1 + len(VARIANTS))}")
    for i, step in enumerate(steps):
        cells = [f"{m[0]:.2f} ± {d[0]:.2f}, {100 * m[1]:.0f} ± {100 * d[1]:.0f} %"
                 for m, d in zip(mean[:, i], deviation[:, i])]
        print(f"| {step} | {' | '.join(cells)} |")
    print(f"\nFrechet distance of samples by the classifier's features, and the share that it reads; seeds "
          f"{', '.join(seeds)}. Of real letters: {results['real']}. {home}/compare.json has all figures.")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("The curves need matplotlib: pip install matplotlib")
    figure = Figure((10, 4.5), layout="constrained")
    for column, axis in enumerate(figure.subplots(1, 2)):
        for variant, m, d in zip(VARIANTS, mean[..., column], deviation[..., column]):
            axis.errorbar(steps, m, d, label=variant)
        axis.set(xlabel="step", title=("Frechet distance", "share read right")[column],
                 yscale=("log", "linear")[column])
        axis.legend()
    with haste.replacing(home / "compare.png") as f:
        figure.savefig(f, format="png", dpi=80)


if __name__ == "__main__":
    main()
