# SPDX-License-Identifier: MIT
"""FID, sFID, Inception Score, precision and recall as ADM's TensorFlow evaluator computes them, in PyTorch.

    torchrun --nproc_per_node=8 evaluate.py --ckpt runs/NAME/checkpoints/0400000.pt --ref REF
    python evaluate.py --ckpt runs/ONE runs/TWO/checkpoints --ref REF       # the newest of ONE, all of TWO
    python evaluate.py --samples SAMPLES --ref REF          # an .npz, or a folder of images
    python evaluate.py --make-ref IMAGES --out ref.npz      # a reference of your own images

    FID, sFID   |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of the pooled and the spatial features
    IS          exp(mean of sum p (log p - log mean p)), the mean over splits of 5,000 samples
    precision   fraction of samples within the k-NN radius of a reference image, k = 3
    recall      fraction of reference images within the k-NN radius of a sample

REF is VIRTUAL_imagenet256_labeled.npz of openai/guided-diffusion, as in DiT, SiT, REPA and HASTE. --ckpt
draws PNGs into a folder, only those that are missing, and measures it. Run the same command again to resume.

What moves a FID: the sampler, its steps and its guidance; fewer samples, which raise it (a CIFAR-10 model had
5.12 with 50,000 and 9.75 with 5,000: github.com/atong01/conditional-flow-matching/issues/111); equal numbers
of the classes, --balanced; JPEG files; another resize; TF32 in the Inception (measured here, on 620 images:
46.788 with it, 46.830 without). ADM computes precision and recall in fp16, here they are in fp32. Samples are
drawn in fp32, with TF32 on a GPU, as the released code draws them; --precision bf16 is another protocol.

Sections 1 to 5 are the evaluation. Sections 6 and 7 are --demo and --demo --compare of haste.py, which run
ordinary commands of both programs.
"""
import itertools
import json
import math
import os
import shlex
import sys
import zlib
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.linalg.lapack import dpstrf
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import normalize, pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

import haste
from haste import DEVICE, RANK, WORLD_SIZE, UserError, atomic_write, user_error

# Features of the Inception for FID, for sFID, and for the Inception Score.
POOL_DIM = 2048
SPATIAL_DIM = 2023
LOGITS_DIM = 1008
# Images at a time. On a CPU, larger tensors would get new memory each time, which takes a tenth of the time.
BATCH_SIZE = 16 if DEVICE.type == "cpu" else 64
# Samples in a split of the Inception Score.
SPLIT_SIZE = 5000
# k of precision and recall.
NEIGHBOURS = 3
# How many images --make-ref stores for precision and recall.
MAX_REFERENCES = 10_000
METRICS = ("fid", "sfid", "is", "precision", "recall")
# The flags that decide what --ckpt draws, beside the weights and the labels.
SAMPLE_SETTINGS = ("num_samples", "balanced", "batch_size", "seed", "mode", "num_steps", "cfg_scale",
                   "guidance_low", "guidance_high", "precision")
# The file in which torch-fidelity converted the weights of TensorFlow's network.
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"


# ---- 1. The network: the Inception of 2015-12-05 -----------------------------------------------------------

def tf1_resize(x, size=299):
    """x (B, C, H, W) float -> (B, C, 299, 299), as TensorFlow 1 resizes bilinearly.

    It has neither half-pixel centres nor aligned corners. Taken along x and then along y, this equals
    TensorFlow's result to the bit.
    """
    for dim in (3, 2):
        n = x.shape[dim]
        # The scale is rounded to fp32, as TensorFlow rounds it.
        positions = torch.arange(size, dtype=torch.float32, device=x.device) * float(np.float32(n / size))
        low = positions.floor().long()
        high = (low + 1).clamp(max=n - 1)
        weight = positions - low
        if dim == 2:
            weight = weight[:, None]
        a = x.index_select(dim, low)
        b = x.index_select(dim, high)
        # a + (b - a) * weight, in place: these tensors are large.
        x = b.sub_(a).mul_(weight).add_(a)
    return x


def undo_counted_padding(branch, args):
    """A hook before the convolution after an average pool: timm's pool counts the padding as zeros, which
    TensorFlow's leaves out."""
    x, = args
    counted = F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1)
    # In place, as in tf1_resize.
    return x.div_(counted)


class Inception(nn.Module):
    """images (B, 3, H, W) uint8 -> pool (B, 2048), spatial (B, 2023), logits (B, 1008) without bias, in fp32.

    weights: a file with the converted weights, "random", or None to download them.
    """

    def __init__(self, weights=None):
        super().__init__()
        net = timm.create_model("inception_v3", pretrained=False, num_classes=LOGITS_DIM, aux_logits=False)
        if weights == "random":
            randomise(net)
        else:
            load_weights(net, weights)
        net.eval()
        # timm's bn is batch norm and ReLU. The norm becomes a part of the convolution before it: faster.
        for module in net.modules():
            if hasattr(module, "bn"):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.ReLU(inplace=True)
        # Where TensorFlow's graph differs from timm's: padding in the pools, and a maximum in Mixed_7c.
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            getattr(net, f"Mixed_{name}").branch_pool.register_forward_pre_hook(undo_counted_padding)
        self.kept = {}
        net.Mixed_7c.register_forward_pre_hook(self.keep_input)
        net.Mixed_7c.branch_pool.register_forward_pre_hook(self.pool_by_maximum)
        net.Mixed_6d.register_forward_hook(self.keep_spatial)
        self.net = net.requires_grad_(False).to(memory_format=torch.channels_last)

    def keep_input(self, block, args):
        self.kept["input"] = args[0]

    def pool_by_maximum(self, branch, args):
        return F.max_pool2d(self.kept.pop("input"), 3, 1, 1)

    def keep_spatial(self, block, args, output):
        # ADM's spatial features: seven channels, which forward puts in the order of height, width, channel.
        self.kept["spatial"] = output[:, :7]

    @torch.no_grad()
    def forward(self, images):
        x = tf1_resize(images.float()).sub_(128).div_(128)
        x = x.contiguous(memory_format=torch.channels_last)
        pool = self.net.forward_features(x).mean((2, 3))
        spatial = self.kept.pop("spatial").permute(0, 2, 3, 1).flatten(1)
        return pool, spatial, pool @ self.net.fc.weight.T


def load_weights(net, path):
    file = path or Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
    with user_error(f"the FID Inception's weights could not be loaded: if {file} is damaged, delete it; "
                    f"without internet, get {WEIGHTS_URL} and use --inception FILE"):
        if path:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with haste.first_process_first():
                state = torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True)
        net.load_state_dict(state)


def randomise(net):
    """Weights of a fixed seed that keep activations alive: He's; one pass over noise sets batch norm."""
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(2015)
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        # Enlarged eight times, noise has neighbours that are alike, as those of images are.
        noise = torch.rand(4, 3, 38, 38) * 2 - 1
        net.train()(F.interpolate(noise, 299, mode="bilinear"))


# ---- 2. The metrics ----------------------------------------------------------------------------------------

def add_to_sums(sums, x):
    """Adds features x (n, d) to sums (d + 1, d + 1) in fp64, of (1, x) (1, x)^T: of 1, of x, and of x x^T."""
    x = F.pad(x.double(), (1, 0), value=1.0)
    sums.addmm_(x.T, x)


def mean_and_covariance(sums):
    """mu (d,) and sigma (d, d), as np.cov with ddof 1."""
    n = sums[0, 0]
    mu = sums[0, 1:] / n
    sigma = (sums[1:, 1:] - n * torch.outer(mu, mu)) / (n - 1)
    return mu, sigma


# |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 sum_i sqrt(lambda_i)
#          with lambda the eigenvalues of R^T S_2 R, and S_1 = R R^T
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """mu (d,), sigma (d, d) of two Gaussians, in fp64 -> a float.

    R^T S_2 R has the eigenvalues of S_1 S_2 and is symmetric, so that this is exact even if S_1, of few
    samples, lacks full rank; sqrtm(S_1 S_2) is not.
    """
    # LAPACK's Cholesky decomposition with pivots also finds the rank, which is small if images are few. Row i
    # of L belongs to row pivots[i] - 1 of S_1.
    L, pivots, rank, _ = dpstrf(sigma1.cpu().numpy(), lower=True)
    L = np.tril(L)[:, :rank]
    R = np.empty_like(L)
    R[pivots - 1] = L
    R = torch.from_numpy(R).to(sigma2)
    eigenvalues = torch.linalg.eigvalsh(R.T @ sigma2 @ R)
    trace = eigenvalues.clamp(min=0).sqrt().sum()
    return (((mu1 - mu2) ** 2).sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


# exp(mean of sum p (log p - log mean p)) = exp(mean of sum p log p - sum mean p log mean p)
def inception_score(splits):
    """The mean of the Inception Scores of splits, each of them logits (n, 1008)."""
    scores = []
    for logits in splits:
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        mean_p = p.mean(0)
        scores.append(((p * log_p).sum(1).mean() - torch.xlogy(mean_p, mean_p).sum()).exp())
    return torch.stack(scores).mean().item()


# ADM computes these in fp16 if they stay finite; fp32 is what it falls back to.
def squared_distances(a, b):
    """Between all rows of a (n, d) and b (m, d): (n, m)."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def knn_radii(x, block=2000):
    """The squared distance from each of x (n, d) to its third neighbour; the first in its row is itself."""
    radii = [squared_distances(part, x).kthvalue(NEIGHBOURS + 1).values for part in x.split(block)]
    return torch.cat(radii)


def fraction_within(x, centres, radii, block=2000):
    """The fraction of x (n, d) that lies within the squared radius of any of the centres (m, d)."""
    hits = [(squared_distances(part, centres) <= radii).any(1) for part in x.split(block)]
    return torch.cat(hits).double().mean().item()


# ---- 3. Images: of files, and drawn from a checkpoint ------------------------------------------------------

class Npz:
    """arr_0 of an .npz, (n, H, W, 3) uint8, in memory: 9.8 GB for 50,000 images of 256 px.

    images[rows] is uint8 (B, 3, H, W).
    """

    names = ()

    def __init__(self, path, arr_0):
        self.arr_0 = arr_0
        self.shape = arr_0.shape
        if arr_0.dtype != np.uint8 or self.shape[3:] != (3,):
            raise UserError(f"arr_0 of {path} is {arr_0.dtype} {self.shape}, and must be uint8 (n, H, W, 3)")

    def __getitem__(self, rows):
        return torch.from_numpy(self.arr_0[list(rows)]).permute(0, 3, 1, 2)


class Folder:
    """The images below a folder, all of one size. images[rows] is uint8 (B, 3, H, W)."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.names = list_images(folder)
        if not self.names:
            raise UserError(f"{folder} holds no images")
        _, _, H, W = self[[0]].shape
        self.shape = (len(self.names), H, W, 3)

    def __getitem__(self, rows):
        images = []
        for i in rows:
            path = self.folder / self.names[i]
            with user_error(f"{path} cannot be read"), Image.open(path) as image:
                images.append(pil_to_tensor(haste.to_rgb(image)))
        return torch.stack(images)


def list_images(folder):
    """Sorted names of the images below a folder. Links are followed; hidden files are left out."""
    names = glob("**/*", root_dir=folder, recursive=True)
    return sorted(name for name in names if name.lower().endswith(IMG_EXTENSIONS))


def split_rows(n, batch_size):
    """range(n) in parts of batch_size, the last of which may be smaller."""
    return [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]


def open_images(path):
    """(images, stored statistics) of a folder, or of an .npz with ADM's keys, which may have no images.

    The statistics are {"fid": (mu, sigma), "sfid": (mu, sigma)}, or as many of them as there are.
    """
    if Path(path).is_dir():
        return Folder(path), {}
    statistics = {}
    images = None
    with user_error(f"{path} is no folder and no intact .npz with ADM's keys"), np.load(path) as file:
        for metric, suffix in (("fid", ""), ("sfid", "_s")):
            if f"mu{suffix}" in file:
                mu = torch.from_numpy(file[f"mu{suffix}"]).double().to(DEVICE)
                sigma = torch.from_numpy(file[f"sigma{suffix}"]).double().to(DEVICE)
                statistics[metric] = mu, sigma
        if "arr_0" in file or not statistics:
            images = Npz(path, file["arr_0"])
    return images, statistics


def list_checkpoints(paths):
    """The files that --ckpt means: checkpoints, all of those in a folder, the newest of a run."""
    checkpoints = []
    for path in map(Path, paths):
        run = path / "checkpoints"
        found = [path] if path.is_file() else []
        if run.is_dir():
            newest = haste.newest_checkpoint(run)
            found = [newest] if newest else []
        elif path.is_dir():
            found = sorted(file for file in path.glob("*.pt") if file.stem.isdecimal())
        if not found:
            raise UserError(f"--ckpt {path}: there is no checkpoint")
        checkpoints += found
    return checkpoints


class Sampler:
    """Draws a checkpoint's samples, as PNGs in a folder.

    A batch is a function of the seed and its first sample's number, whatever the number of processes.
    `settings` is what decides the samples on one kind of device, by content and not by the names of files;
    FOLDER.json holds it.
    """

    def __init__(self, args, path):
        self.args = args
        with haste.first_process_first():
            self.model, run_args = haste.load_ema(path, args.model)
            self.vae = haste.load_decoder(run_args["vae"], args.vae)
        self.scale = run_args["scale"]
        self.interval = (args.guidance_low, args.guidance_high)
        if args.cfg_scale == 1 and self.interval != (0, 1):
            raise UserError("--guidance-low and --guidance-high do nothing at guidance 1: add --cfg-scale")
        self.labels = self.choose_labels(args.num_samples, np.random.default_rng(args.seed))
        # The projector, which may be of any teacher's width, takes no part in sampling.
        weights = {key: x for key, x in self.model.state_dict().items() if not key.startswith("projectors.")}
        self.settings = {name: getattr(args, name) for name in SAMPLE_SETTINGS}
        self.settings |= {
            "model": run_args["model"],
            "weights": haste.checksum(weights),
            "guided_channels": self.model.guided_channels,
            "labels": zlib.crc32("\n".join(map(str, self.labels)).encode()),
            "vae": haste.checksum(self.vae.state_dict()) if self.vae else None,
            "scale": self.scale,
        }
        if args.compile:
            haste.compile_blocks(self.model)
        self.folder = Path(args.out or self.default_folder(Path(path).absolute()))

    def default_folder(self, path):
        args = self.args
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        balanced = "-balanced" if args.balanced else ""
        name = (f"{path.stem}-{args.mode}-{args.num_steps}-cfg-{args.cfg_scale:g}-in-{args.guidance_low:g}-"
                f"{args.guidance_high:g}-seed-{args.seed}-{args.num_samples}{balanced}-{args.precision}")
        return run / "eval" / name

    def choose_labels(self, n, rng):
        """For each of n samples its class, or its caption."""
        source = self.args.captions_from
        if isinstance(self.model, haste.MMDiT) != bool(source):
            raise UserError("an MMDiT needs --captions-from DIR, a prepared dataset whose captions it draws; "
                            "other models take no captions")
        if source:
            data = haste.Data(source)
            texts = [data.captions[name][0] for name in data.names]
            return np.resize(rng.permutation(texts), n)
        classes = self.model.num_classes
        # In random order: samples sorted by class would spoil the splits of IS.
        if self.args.balanced:
            if n % classes:
                raise UserError(f"--balanced: --num-samples {n} is no multiple of the {classes} classes")
            return rng.permutation(np.arange(n) % classes)
        return rng.integers(classes, size=n)

    @torch.no_grad()
    def sample(self, rows):
        """The samples with these numbers, uint8 (B, 3, H, W)."""
        args = self.args
        y = self.labels[rows.start:rows.stop].tolist()
        if args.captions_from:
            y = haste.encode_captions(y)
        else:
            y = torch.tensor(y, device=DEVICE)
        key = np.random.SeedSequence((args.seed, rows.start)).generate_state(1).item()
        noise = haste.seeded_noise(self.model, len(rows), key)
        # Another seed, so that the SDE does not draw the starting noise once more.
        torch.manual_seed(key + 1)
        allow_tf32(True)
        with haste.autocast(args.precision):
            x = haste.sample(self.model, noise, y, args.num_steps, args.cfg_scale, self.interval, args.mode)
        return haste.to_images(x, self.vae, self.scale)

    def draw(self):
        """Draws the batches that lack a file, and returns the images of the folder."""
        record = Path(f"{self.folder}.json")
        recorded = json.loads(record.read_text()) if record.is_file() else {}
        different = [name for name, value in self.settings.items() if recorded.get(name) != value]
        # A folder with samples of two kinds would have a figure of neither.
        if different and list_images(self.folder):
            raise UserError(f"{self.folder} holds images that were drawn in another way, or by another "
                            f"program ({', '.join(different)}): name another --out")
        # All processes have looked before one writes.
        haste.barrier()
        write_json(record, self.settings)
        n = self.args.num_samples
        batches = split_rows(n, self.args.batch_size)[RANK::WORLD_SIZE]
        for rows in tqdm(batches, "drawing", unit=" batches", disable=RANK > 0):
            paths = [self.folder / f"{i:06d}.png" for i in rows]
            if all(path.is_file() for path in paths):
                continue
            arrays = self.sample(rows).permute(0, 2, 3, 1).cpu().numpy()
            for path, array in zip(paths, arrays):
                write_png(path, array)
        haste.barrier()
        images = Folder(self.folder)
        if len(images.names) != n:
            raise UserError(f"{self.folder} holds {len(images.names)} images instead of {n}: all processes "
                            f"need one disk, and this folder for themselves")
        return images


def write_png(path, array):
    with atomic_write(path) as f:
        # Level 1 takes 5 ms for 256 x 256 pixels, the default 18 ms.
        Image.fromarray(array).save(f, "PNG", compress_level=1)


def write_json(path, content):
    """Writes JSON, on the first process only."""
    if RANK == 0:
        with atomic_write(path) as f:
            f.write(json.dumps(content, indent=1).encode())


# ---- 4. Measuring ------------------------------------------------------------------------------------------

def allow_tf32(allowed):
    """Lets a GPU multiply fp32 in TF32: fine for the networks that draw, not for the features."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def measure(images, stored_statistics, net, args, title, keep=True):
    """{"fid": (mu, sigma), "sfid": (mu, sigma), "features": (n, 2048), "logits": (n, 1008)} of images.

    Stored statistics replace measured ones, as in ADM. Each process takes every WORLD_SIZE-th batch.
    """
    if images is None:
        return stored_statistics
    allow_tf32(False)
    ranges = split_rows(images.shape[0], BATCH_SIZE)[RANK::WORLD_SIZE]
    pool_sums, spatial_sums = [
        torch.zeros(d + 1, d + 1, dtype=torch.float64, device=DEVICE) for d in (POOL_DIM, SPATIAL_DIM)]
    # The features of a whole training set would not fit the memory.
    n = images.shape[0] if keep else 0
    features, all_logits = [torch.zeros(n, d, device=DEVICE) for d in (POOL_DIM, LOGITS_DIM)]
    # The loader's processes read a whole batch at a time, images[rows].
    loader = DataLoader(images, batch_size=None, sampler=ranges, num_workers=args.num_workers)
    for rows, batch in zip(tqdm(ranges, title, unit=" batches", disable=RANK > 0), loader):
        pool, spatial, logits = net(batch.to(DEVICE))
        add_to_sums(pool_sums, pool)
        add_to_sums(spatial_sums, spatial)
        if keep:
            features[rows.start:rows.stop] = pool
            all_logits[rows.start:rows.stop] = logits
    # Sums of the processes add up, and each process has filled its own rows of features and logits.
    if WORLD_SIZE > 1:
        for x in (pool_sums, spatial_sums, features, all_logits):
            dist.all_reduce(x)
    statistics = {"fid": mean_and_covariance(pool_sums), "sfid": mean_and_covariance(spatial_sums)}
    return statistics | stored_statistics | {"features": features, "logits": all_logits}


def score(samples, reference):
    """{metric: value} of what `measure` returned, without those that the reference does not allow."""
    results = {}
    for metric in ("fid", "sfid"):
        if metric in reference:
            results[metric] = frechet_distance(*samples[metric], *reference[metric])
    results["is"] = inception_score(samples["logits"].split(SPLIT_SIZE))
    if "features" in reference:
        a, b = samples["features"], reference["features"]
        results["precision"] = fraction_within(a, b, knn_radii(b))
        results["recall"] = fraction_within(b, a, knn_radii(a))
    return results


def list_notes(args, images, references, results):
    """Sentences on what makes these figures incomparable with published ones."""
    notes = []
    if args.inception == "random":
        notes.append("the features are a random network's: figures compare only with one another")
    if "sfid" not in results:
        notes.append("the reference has no mu_s and sigma_s; pytorch-fid and clean-fid write such files, of "
                     "images that were resized in another way: then FID compares with no other")
    if references is not None and references.shape[1:] != images.shape[1:]:
        notes.append("samples and reference images differ in size")
    if any(name.lower().endswith((".jpg", ".jpeg")) for name in images.names):
        notes.append("samples are JPEG files, which moves FID")
    if images.shape[0] < 50_000:
        notes.append(f"only {images.shape[0]:,} samples instead of 50,000: FID is biased upwards")
    return notes


def evaluate(args):
    """Measures each of args.ckpt or args.samples against args.ref, and prints a table of the figures.

    Returns {path: report} on the first process, and an empty dictionary on the others.
    """
    haste.join_processes()
    # Wrong files are found before the hours of drawing.
    net = Inception(args.inception).to(DEVICE)
    if args.make_ref:
        return make_reference(args, net)
    references, statistics = open_images(args.ref)
    checkpoints = list_checkpoints(args.ckpt or ())
    if args.out and len(checkpoints) > 1:
        raise UserError("several checkpoints cannot share one --out: leave it out")
    reference = measure(references, statistics, net, args, "reference")

    reports = {}
    for path in (*(args.samples or ()), *checkpoints):
        sampler = None
        if path in checkpoints:
            sampler = Sampler(args, path)
            images, statistics = sampler.draw(), {}
        else:
            images, statistics = open_images(path)
        measured = measure(images, statistics, net, args, "samples")
        if RANK > 0:
            continue
        results = score(measured, reference)
        report = results | {
            "num_samples": images.shape[0],
            "size": images.shape[1:3],
            "reference": args.ref,
            "inception": args.inception or WEIGHTS,
            "settings": sampler.settings if sampler else {},
            "notes": list_notes(args, images, references, results),
        }
        reports[str(path)] = report
        if sampler:
            # References in several folders may all be called ref.npz.
            ref = Path(args.ref).absolute()
            write_json(f"{sampler.folder}-{ref.parent.name}-{ref.stem}.json", report)
        if args.json:
            # After each, so that a later one's error costs none.
            write_json(args.json, reports)
    if RANK == 0:
        print_table(args, reports)
    return reports


def print_table(args, reports):
    if args.ckpt:
        print(", ".join(f"{name} {getattr(args, name)}" for name in SAMPLE_SETTINGS))
    metrics = [name for name in METRICS if all(name in report for report in reports.values())]
    print("| samples | number |", " | ".join(metrics), "|")
    print("|---|---|" + "---|" * len(metrics))
    for path, report in reports.items():
        cells = [f"{report[name]:.6g}" for name in metrics]
        print(f"| {path} | {report['num_samples']} |", " | ".join(cells), "|")
    # Most notes are the same for all rows.
    for note in dict.fromkeys(itertools.chain(*[report["notes"] for report in reports.values()])):
        print(f"note: {note}")


def make_reference(args, net):
    """--make-ref: ADM's keys, from images; arr_0 holds all of them, or 10,000 evenly spaced ones."""
    path = args.out or "ref.npz"
    if os.path.exists(path):
        raise UserError(f"--make-ref: {path} exists already: name another file with --out")
    images, _ = open_images(args.make_ref)
    measured = measure(images, {}, net, args, "reference", keep=False)
    if RANK > 0:
        return
    n = images.shape[0]
    count = min(n, MAX_REFERENCES)
    chosen = np.linspace(0, n - 1, count).round().astype(int).tolist()
    arr_0 = torch.cat([images[[i]] for i in chosen]).permute(0, 2, 3, 1)
    mu, sigma = [x.cpu() for x in measured["fid"]]
    mu_s, sigma_s = [x.cpu() for x in measured["sfid"]]
    with atomic_write(path) as f:
        np.savez(f, arr_0=arr_0, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    print(f"{path}: mu and sigma of {n:,} images, and {count:,} of the images, for precision and recall")


# ---- 5. The command line -----------------------------------------------------------------------------------

def parse_args(argv=None):
    """The values of evaluate.py's flags."""
    parser = haste.new_parser("evaluate.py")
    add = parser.add_argument_group("what to measure, and against what").add_argument
    add("--ckpt", nargs="+",
        help="draw samples from the EMA of these, and measure them; a folder stands for all of its "
             "checkpoints, and runs/NAME for the run's newest")
    add("--samples", nargs="+", help="measure each of these, an .npz with arr_0 or a folder of images")
    add("--make-ref", metavar="IMAGES", help="write a reference of these images to --out")
    add("--ref", help="an ADM .npz, or a folder of images")
    add("--out", help="for --ckpt a folder (default: in the run's eval/), for --make-ref a file (default: "
                      "ref.npz)")
    add("--json", help="a file for all figures and their protocol; --ckpt also writes one beside its samples")
    add("--inception", metavar="FILE",
        help="the FID Inception's weights (default: downloaded), or random, for tests")

    add = parser.add_argument_group("what --ckpt draws").add_argument
    add("--num-samples", "--num-fid-samples", type=haste.count, default=50_000, help="samples")
    add("--batch-size", type=haste.count, default=64,
        help="samples at a time, in each process; the noise depends on it")
    add("--balanced", action="store_true", help="equally many of each class, in random order")
    add("--captions-from", metavar="DIR", help="the prepared dataset with an MMDiT's captions")
    add("--model", help="for a checkpoint that does not name its model")

    haste.add_sampler_flags(parser, cfg_scale=1.0)
    haste.add_common_flags(
        parser, "of the network that draws; fp32, on a GPU with TF32, is the released code's, and bf16 "
                "another protocol", precision="fp32")
    return parser.parse_args(argv)


def main(argv=None):
    with haste.exit_on_user_error():
        args = parse_args(argv)
        sources = [source for source in (args.ckpt, args.samples, args.make_ref) if source]
        if len(sources) != 1:
            raise UserError("use one of --ckpt, --samples and --make-ref")
        if not args.make_ref and not args.ref:
            raise UserError("--ckpt and --samples need --ref")
        evaluate(args)


# ---- 6. The demo, haste.py --demo: letters, their teacher, and a classifier that reads samples -------------

# Pictures of 24 x 24 pixels; the teacher's patches have 4 x 4.
LETTERS = "ABCEHKRSTX"
SIDE = 24
PATCH = 4
TRAIN_FLAGS = "--model SiT-XS/4 --ema-decay 0.99 --log-every 50 --num-workers 0"
DEMO_FLAGS = ("--batch-size 48 --learning-rate 3e-3 --tau 350 --max-train-steps 700 "
              "--checkpointing-steps 350 --sampling-steps 350")
SAMPLE_FLAGS = "--num-steps 30 --cfg-scale 3"


def draw_letter(label, rng):
    """An image of a letter (3, 24, 24) uint8, and where its ink is (24, 24)."""
    # It is drawn at twice the size, for smooth edges.
    layer = Image.new("L", (2 * SIDE, 2 * SIDE))
    font = ImageFont.load_default(rng.uniform(38, 46))
    x, y = SIDE + rng.uniform(-3, 3, 2)
    ImageDraw.Draw(layer).text((x, y), LETTERS[label], 255, font, anchor="mm", stroke_width=2)
    layer = layer.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    mask = np.asarray(layer.resize((SIDE, SIDE), Image.Resampling.BOX)) / 255
    ground = rng.uniform(0, 90, (3, 1, 1))
    ink = rng.uniform(140, 255, (3, 1, 1))
    image = ground + mask * (ink - ground)
    return image.astype(np.uint8), mask > 0.5


def draw_letters(n, seed):
    """n random letters: images (n, 3, 24, 24) uint8, labels (n,), and pixels (n, 24, 24): label + 1 or 0."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(LETTERS), size=n)
    images = []
    pixels = []
    for label in labels:
        image, ink = draw_letter(label, rng)
        images.append(image)
        pixels.append(ink * (label + 1))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(labels), torch.from_numpy(np.stack(pixels))


def fit(net, loss_of, data, steps):
    """A few hundred steps of Adam on the CPU, enough for the demo's teacher and its classifier."""
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in tqdm(range(steps), desc="fitting", dynamic_ncols=True):
        i = torch.randint(len(data[0]), (64,))
        optimizer.zero_grad()
        loss_of(*[x[i] for x in data]).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def fit_teacher(path, images, pixels):
    """Writes a file for --teacher: a ViT of 4 blocks that learned to which letter each pixel belongs."""
    torch.manual_seed(0)
    config = dict(img_size=SIDE, patch_size=PATCH, embed_dim=96, depth=4, num_heads=4, num_classes=0)
    vit = VisionTransformer(**config)
    head = nn.Linear(96, PATCH ** 2 * (1 + len(LETTERS)))

    def pixel_loss(x, pixels):
        # haste.Teacher normalises in the same way.
        x = normalize(x / 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        logits = head(vit.forward_features(x)[:, 1:])                               # (B, N, 16 x 11)
        target = F.pixel_unshuffle(pixels[:, None], PATCH).flatten(2).mT            # (B, N, 16)
        return F.cross_entropy(logits.view(target.numel(), -1), target.flatten())

    fit(nn.ModuleList([vit, head]), pixel_loss, (images, pixels), 250)
    with atomic_write(path) as f:
        torch.save({"config": config, "model": vit.state_dict()}, f)


def fit_classifier():
    """A small convolutional network, independent of teacher and student, fitted to letters of its own."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 6, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, len(LETTERS)))
    images, labels, _ = draw_letters(4000, seed=1)
    return fit(net, lambda x, y: F.cross_entropy(net(x.float()), y), (images, labels), 300)


def accuracy(classifier, images, labels):
    return (classifier(images.float()).argmax(1) == labels).double().mean().item()


def announce(program, line):
    """Prints a command, and returns the values of its flags."""
    print("\n$ python", program, line)
    parse = haste.parse_args if program == "haste.py" else parse_args
    return parse(shlex.split(line))


def prepare_letters(home):
    """Makes a dataset of letters and a teacher, and returns the flags that name them."""
    at = shlex.quote(str(home))
    print("drawing letters, and fitting the teacher to them")
    # A tree of class folders, as --prepare takes it.
    images, labels, pixels = draw_letters(4000, seed=0)
    for i, (image, label) in enumerate(zip(images, labels)):
        write_png(home / "letters" / LETTERS[label] / f"{i:04d}.png", image.permute(1, 2, 0).numpy())
    if not (home / "teacher.pt").is_file():
        fit_teacher(home / "teacher.pt", images, pixels)
    haste.prepare(announce(
        "haste.py", f"--prepare {at}/letters --data-dir {at}/data --resolution {SIDE} --vae none"))
    return f"--data-dir {at}/data --teacher {at}/teacher.pt"


def sample_letters(sampler):
    """(images (n, 3, 24, 24) uint8, labels (n,)) that evaluate.py measures."""
    labels = torch.from_numpy(sampler.labels)
    return sampler.draw()[range(len(labels))], labels


def demo(argv):
    """haste.py --demo: draws letters, fits a teacher, runs ordinary commands. argv goes to the training."""
    # Flags other than these two go to the training, after the demo's own, and so override them.
    args = haste.parse_args(argv)
    training_flags = shlex.join(flag for flag in argv if flag not in ("--demo", "--compare"))
    if args.compare:
        return compare(args, training_flags)
    home = Path(args.output_dir, args.exp_name or "demo")
    at = shlex.quote(str(home))
    data_flags = prepare_letters(home)
    training = announce(
        "haste.py", f"{data_flags} --exp-name demo {TRAIN_FLAGS} {DEMO_FLAGS} {SAMPLE_FLAGS} "
                    f"{training_flags}")
    code = haste.train(training)
    if code:
        return code
    classifier = fit_classifier()
    real, real_labels, _ = draw_letters(500, seed=2)
    print(f"\nthe classifier recognises {accuracy(classifier, real, real_labels):.0%} of real letters")
    np.savez(home / "real.npz", arr_0=real[:50].permute(0, 2, 3, 1))
    # A run that was stopped has more checkpoints than these.
    paths = [path for path in list_checkpoints([home / "checkpoints"])
             if int(path.stem) in (training.tau, training.max_train_steps)]
    evaluation = announce(
        "evaluate.py", f"--ckpt {shlex.join(map(str, paths))} --num-samples 100 {SAMPLE_FLAGS} "
                       f"--num-workers 0 --ref {at}/real.npz --inception random")
    evaluate(evaluation)
    rows = []
    for path in paths:
        images, labels = sample_letters(Sampler(evaluation, path))
        correct = accuracy(classifier, images, labels)
        print(f"the classifier recognises {correct:.0%} of the samples at step {int(path.stem)}")
        rows.append(images[:12])
    haste.sample_from(announce(
        "haste.py", f"--sample {shlex.quote(str(path))} {SAMPLE_FLAGS} --out {at}/samples.png"))
    # All checkpoints draw the same labels; the first row has a real letter of each of them.
    first_row = [real[real_labels == label][0] for label in labels[:12]]
    picture = torch.cat([torch.stack(first_row), *rows]) / 255
    with atomic_write(home / "demo.png") as f:
        save_image(F.interpolate(picture, scale_factor=6), f, "png", nrow=12)
    print(f"{home}/demo.png has real letters in its first row, and each checkpoint's below")
    return 0


# ---- 7. The paper's claims in small, haste.py --demo --compare ---------------------------------------------

COMPARE_FLAGS = ("--batch-size 16 --learning-rate 1e-3 --ema-decay 0.995 --max-train-steps 3000 "
                 "--checkpointing-steps 600 --tau-from 300 --tau-every 300 --tau-images 256 "
                 "--sampling-steps 0")
MEASURE_FLAGS = "--num-samples 500 --mode heun --num-steps 10 --num-workers 0"
# L_diff on held-out letters is measured as a whole and in these intervals of t, low < t <= high.
INTERVALS = {"L_diff": (0, 1), "L_diff, t <= 0.1": (0, 0.1), "L_diff, 0.1 < t <= 0.5": (0.1, 0.5),
             "L_diff, t > 0.5": (0.5, 1)}


def list_variants(every):
    """The flags of each run; `every` is the number of steps between checkpoints.

    All start from the same weights, with the same batches and noise. "never" also measures the cosines of
    the trigger, which never fires at -1.
    """
    return {
        "never": "--tau auto --tau-cosine -1",
        f"HASTE {every}": f"--tau {every}",
        f"HASTE {2 * every}": f"--tau {2 * every}",
        "plain": "--tau 0",
        "REPA": "--tau never --lambda-a 0",
        "attention": "--tau never --lambda-r 0",
    }


def classifier_statistics(classifier, images):
    """mu and sigma of the classifier's 64 features."""
    features = classifier[:-2](images.float()).double()         # (n, 64)
    return features.mean(0), features.T.cov()


@torch.no_grad()
def held_out_losses(model):
    """{name: L_diff in this interval of t} on 2,000 letters of their own, at fixed times and noise."""
    images, labels, _ = draw_letters(2000, seed=3)
    x0 = images.to(DEVICE) / 127.5 - 1
    n = len(x0)
    t = (torch.arange(n, device=DEVICE) + 0.5) / n
    _, _, eps, _ = haste.randomness(n, x0.shape[1:], 3)
    x_t, _ = model.diffusion.add_noise(x0, eps, t)
    batches = zip(x_t.split(250), t.split(250), labels.to(DEVICE).split(250))
    v = torch.cat([model(*batch) for batch in batches])
    result = {}
    for name, (low, high) in INTERVALS.items():
        i = (low < t) & (t <= high)
        result[name] = model.diffusion.loss(v[i], x0[i], eps[i], x_t[i], t[i]).item()
    return result


def compare(args, training_flags):
    """haste.py --demo --compare: trains list_variants() one after another by ordinary commands, and measures
    their checkpoints. What compare.json holds is not done again."""
    exp_name = args.exp_name or "compare"
    home = Path(args.output_dir, exp_name)
    path = home / "compare.json"
    data_flags = prepare_letters(home)
    common = f"{data_flags} {TRAIN_FLAGS} {COMPARE_FLAGS} {training_flags}"
    every = haste.parse_args(shlex.split(common)).checkpointing_steps
    variants = list_variants(every)
    # Wrong flags of any variant are found before the first is trained.
    for flags in variants.values():
        training = haste.parse_args(shlex.split(f"{common} {flags}"))
    if training.max_train_steps < 2 * every:
        raise UserError(f"--compare stops HASTE at {every} and {2 * every}, where there are checkpoints: use "
                        f"more --max-train-steps, or fewer --checkpointing-steps")
    flags = vars(args) | {"seed": None, "seeds": None}
    results = {"flags": flags, "runs": {}, "cosines": {}}
    if path.is_file():
        results = json.loads(path.read_text())
    if results["flags"] != flags:
        raise UserError(f"{path} compares with other flags: name another --exp-name")
    classifier = fit_classifier()
    real, labels, _ = draw_letters(2000, seed=2)
    reference = classifier_statistics(classifier, real[:1000])

    def measure_letters(images, labels):
        """Frechet distance by the classifier's features, and the fraction that it recognises."""
        distance = frechet_distance(*classifier_statistics(classifier, images), *reference)
        return {"Frechet distance": distance, "recognised": accuracy(classifier, images, labels)}

    results["real"] = measure_letters(real[1000:], labels[1000:])
    seeds = [str(seed) for seed in range(args.seed, args.seed + args.seeds)]
    for seed, (variant, flags) in itertools.product(seeds, variants.items()):
        runs = results["runs"].setdefault(variant, {})
        if seed in runs:
            continue
        run = f"{exp_name}/seed{seed}/{variant.replace(' ', '-')}"
        training = announce("haste.py", f"{common} {flags} --seed {seed} --exp-name {shlex.quote(run)}")
        code = haste.train(training)
        if code:
            return code
        runs[seed] = {}
        for step in range(every, training.max_train_steps + 1, every):
            evaluation = parse_args(["--seed", seed, *MEASURE_FLAGS.split()])
            sampler = Sampler(evaluation, Path(args.output_dir, run, f"checkpoints/{step:07d}.pt"))
            figures = measure_letters(*sample_letters(sampler))
            runs[seed][str(step)] = figures | held_out_losses(sampler.model)
        if variant == "never":
            lines = Path(args.output_dir, run, "metrics.jsonl").read_text().splitlines()
            measurements = [line for line in map(json.loads, lines) if "cosines" in line]
            results["cosines"][seed] = {str(line["step"]): line["cosines"] for line in measurements}
        write_json(path, results)
    report_comparison(home, results, seeds)
    return 0


def mean_and_error(x):
    """The mean over the first axis of x, the seeds, and its standard error (0 for a single seed)."""
    n = len(x)
    return x.mean(0), x.std(0, ddof=1 if n > 1 else 0) / math.sqrt(n)


def report_comparison(home, results, seeds):
    """Prints a table of each metric, with the paired differences to the first HASTE, and draws curves."""
    variants = list(results["runs"])
    haste_early = variants[1]
    steps = list(results["runs"]["never"][seeds[0]])
    metrics = list(results["runs"]["never"][seeds[0]][steps[0]])
    # Of each variant and metric, (seeds, steps).
    figures = {variant: {metric: np.array([[run[seed][step][metric] for step in steps] for seed in seeds])
                         for metric in metrics}
               for variant, run in results["runs"].items()}
    for metric in metrics:
        print(f"\n| {metric}, step |", " | ".join(variants), "|")
        print("|---|" + "---|" * len(variants))
        for i, step in enumerate(steps):
            cells = []
            for variant in variants:
                x = figures[variant][metric][:, i]
                difference, error = mean_and_error(x - figures[haste_early][metric][:, i])
                cells.append(f"{x.mean():.4g} ({difference:+.3g} ± {error:.2g})")
            print(f"| {step} |", " | ".join(cells), "|")
    real = ", ".join(f"{metric} {value:.4g}" for metric, value in results["real"].items())
    print(f"\nMeans over the seeds {', '.join(seeds)}; in brackets the mean difference to {haste_early} at "
          f"the same seed, ± its standard error. Frechet distance and recognition are by the classifier; "
          f"L_diff is that of the EMA on held-out letters. Real letters: {real}. "
          f"{home}/compare.json has all.")
    if not find_spec("matplotlib"):
        print("for a picture of the curves, pip install matplotlib, and run the same command again")
        return

    from matplotlib.figure import Figure
    figure = Figure((11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    x = [int(step) for step in steps]
    for variant in variants:
        axes[0, 0].errorbar(x, *mean_and_error(figures[variant]["Frechet distance"]), label=variant)
    axes[0, 0].set(title="Frechet distance", yscale="log")
    for variant in variants[1:4]:
        gap = figures["never"]["L_diff"] - figures[variant]["L_diff"]
        axes[0, 1].errorbar(x, *mean_and_error(gap), label=variant)
    axes[0, 1].set(title='held-out L_diff: "never" minus')
    for metric in INTERVALS:
        gap = figures["never"][metric] - figures[haste_early][metric]
        axes[1, 0].errorbar(x, *mean_and_error(gap), label=metric)
    axes[1, 0].set(title=f'held-out L_diff: "never" minus {haste_early}, by time')
    measured = list(results["cosines"][seeds[0]])
    cosines = np.array([[results["cosines"][seed][step] for step in measured] for seed in seeds])
    x = [int(step) for step in measured]
    for k, t in enumerate(haste.TRIGGER_TIMES):
        axes[1, 1].errorbar(x, *mean_and_error(cosines[:, :, k]), label=f"t = {t}")
    axes[1, 1].set(title="cosine of the gradients of alignment and L_diff")
    for axis in axes.flat:
        axis.set(xlabel="step")
        axis.legend()
    for axis in axes.flat[1:]:
        axis.axhline(0, color="grey", linewidth=0.5)
    with atomic_write(home / "compare.png") as f:
        figure.savefig(f, format="png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
