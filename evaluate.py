# SPDX-License-Identifier: MIT
"""FID, sFID, Inception Score, precision and recall as ADM's TensorFlow evaluator computes them, in PyTorch.

    torchrun --nproc_per_node=8 evaluate.py --ckpt runs/SiT-XL-2/checkpoints/0400000.pt --ref VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --samples SAMPLES --ref REF           # each an ADM .npz, a folder of images, or --prepare's folder
    python evaluate.py --make-ref IMAGES --out ref.npz       # the statistics of images, under ADM's keys

    FID, sFID   |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of the pooled and the spatial features
    IS          exp(mean sum p (log p - log mean p)), the mean over splits of 5,000 samples
    precision   the share of samples within a reference image's distance to its third neighbour; recall: vice versa

The reference statistics and the protocol are those of openai/guided-diffusion, which DiT, SiT, REPA and HASTE report with.
"""
import argparse
import json
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import scipy.linalg
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid
from tqdm import tqdm

import haste
from haste import BadInput, barrier, brief, number, write_file

POOL, SPATIAL, LOGITS, SPLIT = 2048, 2023, 1008, 5000
WEIGHTS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
RANDOM = "random features: comparable only with itself"


# ---- 1. The network: the Inception of 2015-12-05 -------------------------------------------------------------

def tf1_resize(x, size=299):
    """x (B, C, H, W) float in 0..255 -> (B, C, 299, 299): TensorFlow 1's bilinear, with neither half-pixel centres nor
    aligned corners. As gathers, it equals TensorFlow's to the bit."""
    def grid(n):
        at = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(n / size, dtype=torch.float32)
        low = at.floor().long()
        return low, (low + 1).clamp(max=n - 1), at - low
    (top, bottom, dy), (left, right, dx) = grid(x.shape[2]), grid(x.shape[3])
    x = x[..., left] + (x[..., right] - x[..., left]) * dx
    return x[:, :, top] + (x[:, :, bottom] - x[:, :, top]) * dy[:, None]


class Pooled(nn.Module):
    """An Inception block's pooling branch, which pools the block's input x as TensorFlow did, whatever timm pooled."""

    def __init__(self, conv, maximum):
        super().__init__()
        self.conv, self.maximum, self.x = conv, maximum, None

    def forward(self, _):
        x, self.x = self.x, None
        if self.maximum:
            return self.conv(F.max_pool2d(x, 3, 1, 1))
        # The mean of a linear map is the map of the mean: after the 1x1 convolution there is less to pool.
        return F.relu(F.avg_pool2d(self.conv.conv(x), 3, 1, 1, count_include_pad=False))


class Inception(nn.Module):
    """images (B, 3, H, W) uint8 -> pool (B, 2048), spatial (B, 2023), logits (B, 1008) without bias, all fp32.

    weights: a file with the converted weights, "random", or None to download them. Raises BadInput."""

    def __init__(self, weights=None):
        super().__init__()
        net = timm.create_model("inception_v3", pretrained=False, num_classes=LOGITS, aux_logits=False)
        if weights == "random":
            randomise(net)
        else:
            try:
                load = torch.hub.load_state_dict_from_url
                state = torch.load(weights, map_location="cpu", weights_only=True) if weights else load(WEIGHTS, check_hash=True)
                net.load_state_dict(state, strict=True)
            except Exception as e:      # no network, a torn file, another network's weights
                hint = "" if weights else f"; without internet, get {WEIGHTS} and pass it as --inception FILE"
                raise BadInput(f"the weights {weights or 'of the FID Inception'} could not be loaded ({brief(e)}){hint}") from e
        net.eval()
        for m in net.modules():         # batch norm goes into the convolution before it
            if hasattr(m, "conv") and hasattr(m, "bn"):
                m.conv, m.bn = fuse_conv_bn_eval(m.conv, m.bn), nn.ReLU(inplace=True)
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
            block = getattr(net, f"Mixed_{name}")
            block.branch_pool = Pooled(block.branch_pool, maximum=name == "7c")
            block.register_forward_pre_hook(lambda block, args: setattr(block.branch_pool, "x", args[0]))
        net.Mixed_6d.register_forward_hook(lambda block, args, out: setattr(self, "spatial", out[:, :7]))
        self.net = net.requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images):
        x = (tf1_resize(images.float()) - 128) / 128
        pool = self.net.forward_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        spatial = self.spatial.permute(0, 2, 3, 1).flatten(1)       # in TensorFlow's order: height, width, channel
        return pool, spatial, pool @ self.net.fc.weight.T


def randomise(net):
    """Weights of a fixed seed that keep the activations alive: He, and batch norm set by one pass over noise."""
    g = torch.Generator().manual_seed(2015)
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.weight.data = torch.randn(m.weight.shape, generator=g) * (2 / m.weight[0].numel()) ** 0.5
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    noise = F.interpolate(torch.rand(8, 3, 38, 38, generator=g) * 2 - 1, 299, mode="bilinear")
    with torch.no_grad():
        net.train()(noise)


# ---- 2. The metrics ------------------------------------------------------------------------------------------

class Moments:
    """Mean and covariance of features (B, d) that stream by, as sums in double precision."""

    def __init__(self, d, device):
        self.n, self.sum, self.outer = 0, torch.zeros(d, dtype=torch.float64, device=device), None
        self.outer = torch.zeros(d, d, dtype=torch.float64, device=device)

    def add(self, x):
        x = x.double()
        self.n, self.sum, self.outer = self.n + len(x), self.sum.add_(x.sum(0)), self.outer.addmm_(x.T, x)

    def statistics(self):
        mean = self.sum / self.n
        covariance = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()


# |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 sum_i sqrt(lambda_i),  lambda the eigenvalues of R^T S_2 R,  S_1 = R R^T
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """mu (d,), sigma (d, d) of two Gaussians, in float64. Two symmetric eigenvalue problems: S_1 S_2 has the eigenvalues
    of R^T S_2 R, and clamping them at 0 stays right where a covariance lacks full rank, as sqrtm does not."""
    w, V = scipy.linalg.eigh(sigma1, driver="evd", check_finite=False)
    R = V * np.sqrt(w.clip(0))
    shared = scipy.linalg.eigvalsh(R.T @ sigma2 @ R, check_finite=False)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(shared.clip(0)).sum())


class InceptionScore:
    """Sums for exp(mean over a split of sum p (log p - log mean p)), kept for each split of 5,000 samples."""

    def __init__(self, n, device):
        splits = -(-n // SPLIT)
        self.p = torch.zeros(splits, LOGITS, dtype=torch.float64, device=device)
        self.entropy = torch.zeros(splits, dtype=torch.float64, device=device)
        self.counts = torch.tensor([min(SPLIT, n - i * SPLIT) for i in range(splits)], device=device)

    def add(self, logits, places):
        log_p, split = logits.double().log_softmax(1), torch.as_tensor(places, device=logits.device) // SPLIT
        self.p.index_add_(0, split, log_p.exp())
        self.entropy.index_add_(0, split, (log_p.exp() * log_p).sum(1))

    def score(self):
        mean = self.p / self.counts[:, None]
        return (self.entropy / self.counts - torch.xlogy(mean, mean).sum(1)).exp().mean().item()


def squared_distances(a, b):
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def radii(x, k=3, block=2000):
    """The squared distance from each x (n, d) to its k-th neighbour."""
    return torch.cat([squared_distances(part, x).kthvalue(k + 1).values for part in x.split(block)])    # itself first


def inside(x, centres, reach, block=2000):
    """The share of x that lies within reach (squared) of any of centres."""
    return torch.cat([(squared_distances(part, centres) <= reach).any(1) for part in x.split(block)]).float().mean().item()


# ---- 3. Where images come from -------------------------------------------------------------------------------

class Npz(Dataset):
    """arr_0 of an ADM .npz, (n, H, W, 3) uint8, read in rows from the file, never as a whole."""

    def __init__(self, path):
        self.path, self.file = path, None
        shape, _, dtype = self.open()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            hint = ": it is NCHW, transpose it to NHWC" if len(shape) == 4 and shape[1] == 3 else ""
            raise BadInput(f"{path}: arr_0 is {dtype} {shape}, not uint8 (n, H, W, 3){hint}")
        self.shape = shape
        if self.file.seek(0, 2) - self.start < np.prod(shape):
            raise BadInput(f"{path}: arr_0 is cut short")
        self.file = None        # each loader process opens its own

    def open(self):
        self.file = zipfile.ZipFile(self.path).open("arr_0.npy")
        version = np.lib.format.read_magic(self.file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        described = header(self.file)
        self.start = self.file.tell()
        return described

    def __reduce__(self):
        return Npz, (self.path,)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        if self.file is None:
            self.open()
        each = int(np.prod(self.shape[1:]))
        self.file.seek(self.start + rows.start * each)
        images = np.frombuffer(self.file.read(len(rows) * each), np.uint8).reshape(len(rows), *self.shape[1:])
        return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


class Folder(Dataset):
    """The images below a folder, all of one size."""

    def __init__(self, folder):
        self.paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in haste.ENDINGS)
        if not self.paths:
            raise BadInput(f"{folder} has no images ({', '.join(haste.ENDINGS)})")
        self.shape = (len(self.paths), *self.read(self.paths[0]).shape[1:], 3)

    def read(self, path):
        try:
            with Image.open(path) as image:
                return haste.to_array(image)
        except Exception as e:      # a broken file can make Pillow raise anything
            raise BadInput(f"{path} cannot be read ({brief(e)})") from e

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        images = [self.read(self.paths[i]) for i in rows]
        for i, image in zip(rows, images):
            if image.shape[1:] != self.shape[1:3]:
                raise BadInput(f"{self.paths[i]} is {image.shape[2]} x {image.shape[1]}, where {self.paths[0].name} is "
                               f"{self.shape[2]} x {self.shape[1]}: images must be of one size")
        return torch.from_numpy(np.stack(images))


class Prepared(Dataset):
    """The images of a dataset that `haste.py --prepare` made."""

    def __init__(self, folder):
        self.data = haste.Data(folder)
        self.shape = (len(self.data), self.data.resolution, self.data.resolution, 3)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, rows):
        return self.data[np.array(rows), True]["images"]


def open_images(path):
    """The images at path, as a dataset that gives (B, 3, H, W) uint8 for a range of rows. Raises BadInput."""
    path = Path(path)
    if path.is_dir():
        return Prepared(path) if (path / "labels.npy").is_file() or (path / "vae-sd").is_dir() else Folder(path)
    if not path.is_file():
        raise BadInput(f"there is no file or folder {path}")
    try:
        return Npz(path)
    except (KeyError, zipfile.BadZipFile, ValueError, EOFError, OSError) as e:
        if isinstance(e, BadInput):
            raise
        what = "holds no images under arr_0" if isinstance(e, KeyError) else "is no whole .npz file"
        raise BadInput(f"{path} {what} ({brief(e)})") from e


def read_statistics(path):
    """{"pool": (mu, sigma), "spatial": (mu, sigma)} of an .npz with ADM's keys; None where there are none. BadInput."""
    if not zipfile.is_zipfile(path):
        return None
    with np.load(path, allow_pickle=False) as file:
        if "mu" not in file.files:
            return None
        if "mu_s" not in file.files or "sigma_s" not in file.files:
            raise BadInput(f"{path} has mu and sigma but not mu_s and sigma_s: it is a statistics file of pytorch-fid or clean-fid, "
                           f"whose resizing differs from ADM's, so that a FID against it is another number")
        found = {"pool": (file["mu"], file["sigma"]), "spatial": (file["mu_s"], file["sigma_s"])}
    for (name, (mu, sigma)), d in zip(found.items(), (POOL, SPATIAL)):
        if mu.shape != (d,) or sigma.shape != (d, d):
            raise BadInput(f"{path}: the {name} statistics are {mu.shape} and {sigma.shape}, not ({d},) and ({d}, {d})")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise BadInput(f"{path}: the {name} statistics are not finite")
    return {name: (mu.astype(np.float64), sigma.astype(np.float64)) for name, (mu, sigma) in found.items()}


class Generated:
    """Samples of a checkpoint's EMA: sample i is a function of (seed, batch size, i), whatever the number of processes."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.model, made = haste.load_model(args.ckpt, args.model)
        self.model.to(device)
        self.vae = haste.load_decoder(made.get("vae", haste.VAE_ENCODER), args, device)
        self.scale, self.classes = made.get("scale", haste.VAE_SCALE), self.model.y_embedder.num_classes
        side = to_side(self.model.input_size, self.vae)
        self.shape = (args.num_samples, side, side, 3)
        rng = np.random.default_rng(args.seed)
        labels = rng.permutation(np.arange(args.num_samples) % self.classes) if args.balanced else \
            rng.integers(self.classes, size=args.num_samples)
        self.labels = torch.from_numpy(labels).to(device)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
        self.autocast = lambda: torch.autocast(device.type, half, enabled=half is not None)

    def __len__(self):
        return self.args.num_samples

    def __getitem__(self, rows):
        args, labels = self.args, self.labels[rows.start:rows.stop]
        key = int(np.random.SeedSequence((args.seed, rows.start)).generate_state(1, np.uint64)[0] >> np.uint64(1))
        noise = haste.seeded_noise(self.model, len(rows), key, self.device)
        torch.manual_seed(key)
        with self.autocast():
            x = haste.sample(self.model, noise, labels, args.num_steps, args.cfg_scale,
                             (args.guidance_low, args.guidance_high), args.mode)
        return haste.to_images(x, self.vae, self.scale)


def to_side(latent, vae):
    return latent * 2 ** (len(vae.config.block_out_channels) - 1) if vae else latent


# ---- 4. One pass over images ---------------------------------------------------------------------------------

def measure(images, net, args, rank, world, device, title, keep_pool=False, state=None, arrays=None):
    """(statistics {"pool", "spatial"}, Inception Score, pooled features or None) of images, shared among the processes.

    state: a file that lets a killed pass go on; arrays: a memory map (n, H, W, 3) that takes the images."""
    n, B = len(images), args.batch_size
    mine = [range(start, min(start + B, n)) for start in range(rank * B, n, world * B)]
    moments = {"pool": Moments(POOL, device), "spatial": Moments(SPATIAL, device)}
    score, kept, done = InceptionScore(n, device), [], 0
    part = state and Path(f"{state}.{rank}of{world}")
    if part and part.is_file():
        saved = haste.load_file(part)
        done, kept, score.p, score.entropy = saved["done"], [saved["kept"]], saved["p"].to(device), saved["entropy"].to(device)
        for name, m in moments.items():
            m.n, m.sum, m.outer = saved[f"{name}_n"], saved[f"{name}_sum"].to(device), saved[f"{name}_outer"].to(device)

    def save():
        tensors = {f"{name}_{k}": getattr(m, k) for name, m in moments.items() for k in ("n", "sum", "outer")}
        pool = torch.cat(kept) if kept else torch.zeros(0, POOL)
        write_file(part, lambda f: torch.save(tensors | {"done": done, "kept": pool, "p": score.p, "entropy": score.entropy}, f))

    batches = (images[rows] for rows in mine[done:]) if isinstance(images, Generated) else \
        DataLoader(images, batch_size=None, sampler=mine[done:], num_workers=args.num_workers)
    bar, last = tqdm(total=n, initial=min(n, done * B * world), desc=title, unit=" images", disable=rank > 0), time.time()
    for rows, batch in zip(mine[done:], batches):
        if arrays is not None:
            arrays[rows.start:rows.stop] = batch.permute(0, 2, 3, 1).cpu().numpy()
        pool, spatial, logits = net(batch.to(device))
        moments["pool"].add(pool)
        moments["spatial"].add(spatial)
        score.add(logits, rows)
        kept += [pool.cpu()] if keep_pool else []
        done += 1
        bar.update(min(len(rows) * world, n - bar.n))
        if part and time.time() - last > args.save_every:
            save()
            last = time.time()
    bar.close()
    if part:
        save()
    pools = torch.cat(kept).to(device) if kept else torch.zeros(0, POOL, device=device)
    if world > 1:
        for m in moments.values():
            count = torch.tensor(m.n, device=device)
            for x in (count, m.sum, m.outer):
                dist.all_reduce(x)
            m.n = count.item()
        dist.all_reduce(score.p)
        dist.all_reduce(score.entropy)
        gathered = [None] * world
        dist.all_gather_object(gathered, pools.cpu())
        pools = torch.cat(gathered).to(device)
    return {name: m.statistics() for name, m in moments.items()}, score.score(), pools if keep_pool else None


# ---- 5. The demo's judge -------------------------------------------------------------------------------------

def fit_judge(images, labels):
    """A convolutional classifier that teacher and student never meet; gives its accuracy on (x, y)."""
    torch.manual_seed(1)
    layers = [layer for c, d in ((3, 32), (32, 64), (64, 64)) for layer in (
        nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU(), nn.MaxPool2d(2))]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, len(haste.LETTERS)))
    haste.fit(net, lambda x, y: F.cross_entropy(net(x / 127.5 - 1), y), (images, labels), 300, "the demo's judge")
    return lambda x, y: (net(x / 127.5 - 1).argmax(1) == y).float().mean().item()


@torch.no_grad()
def judge_letters(home, checkpoints, tau):
    """Prints how many letters the judge reads right, real ones and each checkpoint's; draws them into home/demo.png."""
    with torch.enable_grad():
        right = fit_judge(*haste.render_glyphs(4000, seed=1)[:2])
    classes, (real, of, _) = len(haste.LETTERS), haste.render_glyphs(500, seed=2)
    two_each = torch.stack([torch.nonzero(of == c)[:2, 0] for c in range(classes)]).T.flatten()
    rows = [(f"real letters: the judge reads {right(real, of):.0%} right", real[two_each])]
    for path in checkpoints:
        model, wanted = haste.load_model(path, None)[0], torch.arange(100) % classes
        torch.manual_seed(0)
        drawn = haste.to_images(haste.sample(model, haste.seeded_noise(model, 100, 0, "cpu"), wanted, steps=50, cfg_scale=2.0))
        phase = "II" if isinstance(tau, int) and int(path.stem) > tau else "I"
        rows.append((f"step {int(path.stem)}, phase {phase}: the judge reads {right(drawn, wanted):.0%} right", drawn[:20]))
    picture = Image.new("RGB", (1052, 84 * len(rows) + 8), "white")
    for i, (caption, row) in enumerate(rows):
        print(caption)
        ImageDraw.Draw(picture).text((8, 84 * i + 6), caption, "black", ImageFont.load_default(15))
        row = Image.fromarray(make_grid(row, 20, padding=1, pad_value=255).permute(1, 2, 0).numpy())
        picture.paste(row.resize((1040, 54), Image.Resampling.NEAREST), (6, 84 * i + 28))
    write_file(home / "demo.png", lambda f: picture.save(f, "PNG"))
    print(f"{home}/demo.png shows them; the metrics are in {home}/metrics.jsonl and {home}/metrics.json")


# ---- 6. The command line -------------------------------------------------------------------------------------

def parse(argv):
    parser = haste.Parser(prog="evaluate.py", allow_abbrev=False, description="FID, sFID, IS, precision and recall, as ADM's")
    count, weight, share = number(int, 1), number(float, 0), number(float, 0, 1)
    flag = parser.add_argument_group("what to evaluate").add_mutually_exclusive_group(required=True).add_argument
    flag("--ckpt", help="draw samples from a checkpoint's EMA")
    flag("--samples", help="an .npz with arr_0, a folder of images, or a prepared dataset")
    flag("--make-ref", metavar="IMAGES", help="write a reference of images to --out")
    flag = parser.add_argument_group("against what, and where to").add_argument
    flag("--ref", help="an ADM .npz, statistics, a folder of images, or a prepared dataset")
    flag("--out", default="ref.npz", help="of --make-ref [%(default)s]")
    flag("--json", metavar="FILE", help="write the results there, too")
    flag("--save-npz", metavar="FILE", help="write the samples, as arr_0")
    flag("--inception", metavar="FILE", help="the FID Inception's weights, or `random` [downloaded]")
    flag("--no-prec-recall", action="store_true", help="leave precision and recall out")
    flag("--batch-size", type=count, help="of each process [64 on CUDA, 32 elsewhere]")
    flag("--num-workers", type=number(int, 0), default=min(4, os.cpu_count()), help="a process [%(default)s]")
    flag("--device", choices=("cuda", "mps", "cpu"), help="[the best there is]")
    flag("--save-every", type=weight, default=60, help="seconds between savings of --ckpt's progress [%(default)s]")
    flag = parser.add_argument_group("how --ckpt is sampled: by default the paper's protocol").add_argument
    flag("--num-samples", "--num-fid-samples", type=number(int, 2), default=50_000, help="[%(default)s]")
    flag("--mode", choices=("sde", "ode", "heun"), default="sde", help="[%(default)s]")
    flag("--num-steps", type=number(int, 2), default=250, help="[%(default)s]")
    flag("--cfg-scale", type=weight, default=1.0, help="1: no guidance [%(default)s]")
    flag("--guidance-low", type=share, default=0.0, help="[%(default)s]")
    flag("--guidance-high", type=share, default=1.0, help="[%(default)s]")
    flag("--balanced", action="store_true", help="as many samples of each class, not labels at random")
    flag("--seed", type=number(int, 0), default=0, help="[%(default)s]")
    flag("--precision", choices=("bf16", "fp16", "fp32"), help="of the model [bf16 on CUDA, else fp32]")
    flag("--model", default="SiT-XL/2", help="for a checkpoint that does not say [%(default)s]")
    flag("--vae", metavar="NAME_OR_PATH", help=f"that decodes [{haste.VAE_DECODER}]")
    args = parser.parse_args(argv)
    if not args.make_ref and not args.ref:
        raise BadInput("--ref is missing: the README says where reference files come from, and --make-ref makes one")
    if args.samples and args.save_npz:
        raise BadInput("--save-npz writes the samples that --ckpt draws: --samples has them already")
    return args


def show(line, args):
    print(line + (f"   ({RANDOM})" if args.inception == "random" else ""), flush=True)


def make_ref(args, net, rank, world, device):
    images = open_images(args.make_ref)
    stats, _, _ = measure(images, net, args, rank, world, device, "reference")
    if rank == 0:
        (mu, sigma), (mu_s, sigma_s) = stats["pool"], stats["spatial"]
        first = np.concatenate([images[range(i, min(i + 100, len(images), 10_000))].permute(0, 2, 3, 1).numpy()
                                for i in range(0, min(len(images), 10_000), 100)])
        write_file(Path(args.out), lambda f: np.savez(f, arr_0=first, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s))
        show(f"{args.out}: statistics of {len(images):,} images, and {len(first):,} of them", args)


def evaluate(args):
    """Measures args.ckpt or args.samples against args.ref, prints the protocol and the metrics, and returns both."""
    rank, world, device = haste.setup(args)
    args.batch_size = args.batch_size or (64 if device.type == "cuda" else 32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False     # TF32 moves FID in the third digit
    net = None
    with haste.first_on_node():
        net = Inception(args.inception).to(device)
    if args.make_ref:
        return make_ref(args, net, rank, world, device)

    # --- samples and reference
    reference = read_statistics(args.ref) if Path(args.ref).is_file() else None
    try:
        images_of_ref = open_images(args.ref)
    except BadInput:
        if reference is None:
            raise
        images_of_ref = None
    samples = Generated(args, device) if args.ckpt else open_images(args.samples)
    n, side = len(samples), samples.shape[1]
    if n < 2:
        raise BadInput("a covariance needs at least two samples")
    compare = images_of_ref is not None and not args.no_prec_recall
    protocol = {"samples": args.ckpt or args.samples, "reference": args.ref, "number of samples": n, "resolution": side,
                "features": RANDOM if args.inception == "random" else args.inception or WEIGHTS.rsplit("/", 1)[1]}
    if args.ckpt:
        protocol |= {"sampler": args.mode, "evaluations": 2 * args.num_steps - 1 if args.mode == "heun" else args.num_steps,
                     "guidance": args.cfg_scale, "interval": [args.guidance_low, args.guidance_high],
                     "VAE": args.vae or (haste.VAE_DECODER if samples.vae else "none"), "weights": "EMA",
                     "labels": "balanced" if args.balanced else "uniform at random", "seed": args.seed,
                     "batch size": args.batch_size, "precision": args.precision}
    if rank == 0:
        for name, value in protocol.items():
            show(f"{name:18} {value}", args)
        if images_of_ref is not None and images_of_ref.shape[1:3] != samples.shape[1:3]:
            show(f"warning: samples of {samples.shape[2]} x {side}, a reference of {images_of_ref.shape[2]} x {images_of_ref.shape[1]}", args)
        if n < POOL:
            show(f"warning: {n:,} samples are fewer than {POOL} features: the covariance lacks rank, and FID is far above that of "
                 f"50,000 samples (its bias falls as 1/n: Chong and Forsyth, 2020)", args)

    # --- features
    state = arrays = None
    if args.ckpt:
        name = "-".join(str(protocol[k]) for k in ("sampler", "evaluations", "guidance", "number of samples", "labels", "seed"))
        home = Path(args.ckpt).resolve().parent.parent / "eval"
        state = home / f"{Path(args.ckpt).stem}-{name}.state".replace(" ", "_")
        state.parent.mkdir(parents=True, exist_ok=True)
        if args.save_npz:
            raw = Path(f"{args.save_npz}.part.npy")
            if rank == 0 and not raw.is_file():
                raw.parent.mkdir(parents=True, exist_ok=True)
                np.lib.format.open_memmap(raw, "w+", np.uint8, samples.shape)
            barrier()
            arrays = np.load(raw, mmap_mode="r+")
    stats, score, pool = measure(samples, net, args, rank, world, device, "samples", compare, state, arrays)
    if reference is None or compare:
        of_ref, _, pool_of_ref = measure(images_of_ref, net, args, rank, world, device, "reference", compare)
        reference = reference or of_ref

    # --- metrics
    if rank:
        return None
    results = {"fid": frechet_distance(*stats["pool"], *reference["pool"]),
               "sfid": frechet_distance(*stats["spatial"], *reference["spatial"]), "is": score}
    if compare:
        results |= {"precision": inside(pool, pool_of_ref, radii(pool_of_ref)), "recall": inside(pool_of_ref, pool, radii(pool))}
    for name, value in results.items():
        show(f"{name:18} {value:.6g}", args)
    if not compare:
        why = "--no-prec-recall" if args.no_prec_recall else f"{args.ref} holds statistics but no images"
        show(f"precision, recall  left out: {why}", args)
    report = json.dumps(results | {"protocol": protocol}, indent=1).encode()
    for path in (args.json, state and state.with_suffix(".json")):
        if path:
            write_file(Path(path), lambda f: f.write(report))
    if arrays is not None:
        with zipfile.ZipFile(f"{args.save_npz}.part", "w", zipfile.ZIP_STORED, allowZip64=True) as z:
            z.write(raw, "arr_0.npy")
        os.replace(f"{args.save_npz}.part", args.save_npz)
        raw.unlink()
    return results


def main(argv=None):
    try:
        results = evaluate(parse(argv))
    except BadInput as e:
        if os.environ.get("RANK", "0") == "0" or dist.is_initialized():
            print(f"evaluate.py: {e}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    main()
