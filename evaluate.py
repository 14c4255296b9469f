# SPDX-License-Identifier: MIT
"""FID, sFID, Inception Score, precision and recall as ADM's TensorFlow evaluator computes them, in PyTorch.

    torchrun --nproc_per_node=8 evaluate.py --ckpt runs/NAME/checkpoints/0400000.pt --ref REF
    python evaluate.py --samples SAMPLES --ref REF     # .npz, folder of images, prepared dataset
    python evaluate.py --make-ref IMAGES --out ref.npz # the statistics of images, under ADM's keys

    FID, sFID   |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of the pooled and the spatial features
    IS          exp(mean sum p (log p - log mean p)), the mean over splits of 5,000 samples
    precision   the share of samples that lie nearer to a reference image than its third neighbour does
    recall      the share of reference images that lie as near to a sample

REF is what openai/guided-diffusion published (VIRTUAL_imagenet256_labeled.npz), which DiT, SiT, REPA and
HASTE report with, by the same protocol. Samples are measured as they are drawn: none need be kept.

Sections 1 to 5 are that. Behind them stands what haste.py runs for --demo, --bench and --demo --compare.
"""
import copy
import ctypes
import hashlib
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import scipy.linalg
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.models.vision_transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid
from tqdm import tqdm

import haste
from haste import BadInput, barrier, brief, number, read_json, write_file, write_json

POOL, SPATIAL, LOGITS, SPLIT, NEIGHBOURS, OF_REF = 2048, 2023, 1008, 5000, 3, 10_000
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
RANDOM = "random features: comparable only with itself"


# ---- 1. The network: the Inception of 2015-12-05 -----------------------------------------------------------

def tf1_resize(x, size=299):
    """x (B, C, H, W) float in 0..255 -> (B, C, 299, 299): TensorFlow 1's bilinear, with neither half-pixel
    centres nor aligned corners. As gathers, it equals TensorFlow's to the bit."""
    def grid(n):
        scale = torch.tensor(n / size, dtype=torch.float32)
        at = torch.arange(size, dtype=torch.float32, device=x.device) * scale
        low = at.floor().long()
        return low, (low + 1).clamp(max=n - 1), at - low
    (top, bottom, dy), (left, right, dx) = grid(x.shape[2]), grid(x.shape[3])
    x = x[..., left] + (x[..., right] - x[..., left]) * dx
    return x[:, :, top] + (x[:, :, bottom] - x[:, :, top]) * dy[:, None]


class Pooled(nn.Module):
    """An Inception block's pooling branch, which pools the block's input x as TensorFlow did, unlike timm."""

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
    """images (B, 3, H, W) uint8 -> pool (B, 2048), spatial (B, 2023), logits (B, 1008) without bias, in fp32.

    weights: a file with the converted weights, "random", or None to download them. Raises BadInput."""

    def __init__(self, weights=None):
        super().__init__()
        with torch.device("meta"):      # no time lost on weights to overwrite
            net = timm.create_model("inception_v3", pretrained=False, num_classes=LOGITS, aux_logits=False)
        randomise(net) if weights == "random" else load_weights(net, weights)
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
        spatial = self.spatial.permute(0, 2, 3, 1).flatten(1)   # TensorFlow's order: height, width, channel
        return pool, spatial, pool @ self.net.fc.weight.T


def load_weights(net, path):
    """Puts the weights of that file, or of the download, into net. Raises BadInput."""
    try:
        if path:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True)
        net.load_state_dict(state, strict=True, assign=True)
        net.float()
    except Exception as e:      # no network, a torn file, another network's weights
        hint = "" if path else f"; without internet, get {WEIGHTS_URL} and pass it as --inception FILE"
        raise BadInput(f"{path or WEIGHTS} could not be loaded as the FID Inception's weights "
                       f"({brief(e)}){hint}") from e


def randomise(net):
    """Weights of a fixed seed that keep activations alive: He, and batch norm set by one pass over noise."""
    g = torch.Generator().manual_seed(2015)
    for m in net.to_empty(device="cpu").modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.weight.data.normal_(0, (2 / m.weight[0].numel()) ** 0.5, generator=g)
        if isinstance(m, nn.BatchNorm2d):
            m.reset_parameters()
            m.momentum = 1.0
    nn.init.zeros_(net.fc.bias)
    noise = F.interpolate(torch.rand(4, 3, 38, 38, generator=g) * 2 - 1, 299, mode="bilinear")
    with torch.no_grad():
        net.train()(noise)


# ---- 2. The metrics ----------------------------------------------------------------------------------------

class Moments:
    """Mean and covariance of features (B, d) that stream by, as sums in double precision."""

    def __init__(self, d, device):
        self.n, self.sum, self.outer = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), (d,), (d, d)))

    def add(self, x):
        x = x.double()
        self.n += len(x)
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)

    def statistics(self):
        mean = self.sum / self.n
        covariance = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()


# |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 sum_i sqrt(lambda_i)
#          with lambda the eigenvalues of R^T S_2 R, and S_1 = R R^T
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """mu (d,), sigma (d, d) of two Gaussians, in float64. R^T S_2 R has the eigenvalues of S_1 S_2 and is
    symmetric; clamping them at 0 stays right where a covariance lacks full rank, as sqrtm does not."""
    try:
        R = scipy.linalg.cholesky(sigma1, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:        # it lacks full rank: fewer images than features
        w, V = scipy.linalg.eigh(sigma1, driver="evd", check_finite=False)
        R = V * np.sqrt(w.clip(0))
    shared = scipy.linalg.eigvalsh(R.T @ sigma2 @ R, check_finite=False)
    apart = ((mu1 - mu2) ** 2).sum()
    return float(apart + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(shared.clip(0)).sum())


class InceptionScore:
    """Sums for exp(mean over a split of sum p (log p - log mean p)), kept for each split of 5,000 samples."""

    def __init__(self, n, device):
        sizes = [min(SPLIT, n - start) for start in range(0, n, SPLIT)]
        self.sizes = torch.tensor(sizes, dtype=torch.float64, device=device)
        self.p = torch.zeros(len(sizes), LOGITS, dtype=torch.float64, device=device)
        self.entropy = torch.zeros(len(sizes), dtype=torch.float64, device=device)

    def add(self, logits, rows):
        """logits (B, 1008) of the samples with these numbers."""
        split = torch.tensor(rows, device=logits.device) // SPLIT
        log_p = logits.double().log_softmax(1)
        self.p.index_add_(0, split, log_p.exp())
        self.entropy.index_add_(0, split, (log_p.exp() * log_p).sum(1))

    def score(self):
        mean = self.p / self.sizes[:, None]
        return (self.entropy / self.sizes - torch.xlogy(mean, mean).sum(1)).exp().mean().item()


def squared_distances(a, b):
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def radii(x, k=NEIGHBOURS, block=2000):
    """The squared distance from each x (n, d) to its k-th neighbour; itself comes first."""
    return torch.cat([squared_distances(part, x).kthvalue(k + 1).values for part in x.split(block)])


def inside(x, centres, reach, block=2000):
    """The share of x that lies within reach (squared) of any of centres."""
    hits = [(squared_distances(part, centres) <= reach).any(1) for part in x.split(block)]
    return torch.cat(hits).double().mean().item()


# ---- 3. Where images come from -----------------------------------------------------------------------------

def keys_of(path):
    """The names of the arrays in an .npz. Raises BadInput."""
    try:
        with zipfile.ZipFile(path) as file:
            return {name.removesuffix(".npy") for name in file.namelist()}
    except (zipfile.BadZipFile, OSError) as e:
        raise BadInput(f"{path} is no whole .npz file ({brief(e)})") from e


class Images(Dataset):
    """images[range] gives (B, 3, H, W) uint8; shape is (n, H, W, 3)."""

    def __len__(self):
        return self.shape[0]


class Npz(Images):
    """arr_0 of an ADM .npz, (n, H, W, 3) uint8, read in rows from the file, never as a whole."""

    def __init__(self, path):
        self.path, self.file = path, None
        try:
            shape, fortran, dtype = self.open()
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise BadInput(f"{path}: arr_0 cannot be read ({brief(e)})") from e
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            hint = ": it is NCHW, transpose it to NHWC" if len(shape) == 4 and shape[1] == 3 else ""
            order = " in Fortran's order" if fortran else ""
            raise BadInput(f"{path}: arr_0 is {dtype} {shape}{order}, not uint8 (n, H, W, 3){hint}")
        if self.size - self.start < np.prod(shape):
            raise BadInput(f"{path}: arr_0 is cut short")
        self.shape, self.file = shape, None     # each loader process opens its own

    def open(self):
        with zipfile.ZipFile(self.path) as archive:
            self.file, self.size = archive.open("arr_0.npy"), archive.getinfo("arr_0.npy").file_size
        old = np.lib.format.read_magic(self.file) == (1, 0)
        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        described = header(self.file)
        self.start = self.file.tell()
        return described

    def __reduce__(self):
        return Npz, (self.path,)

    def __getitem__(self, rows):
        each = int(np.prod(self.shape[1:]))
        try:
            if self.file is None:
                self.open()
            self.file.seek(self.start + rows.start * each)
            images = np.frombuffer(self.file.read(len(rows) * each), np.uint8)
            images = images.reshape(len(rows), *self.shape[1:])
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise BadInput(f"{self.path}: arr_0 is damaged near image {rows.start} ({brief(e)})") from e
        return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


class Folder(Images):
    """The images below a folder, all of one size."""

    def __init__(self, folder):
        self.files = haste.Files(haste.files_in(Path(folder), haste.ENDINGS), haste.read_image)
        if not len(self.files):
            raise BadInput(f"{folder} has no images ({', '.join(haste.ENDINGS)})")
        self.shape = (len(self.files), *self.files[0].shape[1:], 3)

    def __getitem__(self, rows):
        images, paths = [self.files[i] for i in rows], self.files.paths
        for i, image in zip(rows, images):
            if image.shape[1:] != self.shape[1:3]:
                raise BadInput(f"{paths[i]} is {size_of((1, *image.shape[1:]))}, and {paths[0]} "
                               f"{size_of(self.shape)}: images must be of one size")
        return torch.from_numpy(np.stack(images))


class Prepared(Images):
    """The images of a dataset that `haste.py --prepare`, or REPA's preprocessing, made."""

    def __init__(self, folder):
        self.data = haste.Data(folder)
        self.shape = (len(self.data), self.data.resolution, self.data.resolution, 3)

    def __getitem__(self, rows):
        try:
            return torch.from_numpy(np.stack([self.data.images[i] for i in self.data.slots[rows]]))
        except (ValueError, OSError) as e:      # of REPA's files: a broken one, or one of another size
            raise BadInput(f"{self.data.folder}, images {rows.start} to {rows.stop - 1}: {brief(e)}") from e


def size_of(shape):
    return f"{shape[2]} x {shape[1]}"       # (n, H, W, ...): width first, as people say it


def open_images(path):
    """The images at path, as a dataset that gives (B, 3, H, W) uint8 for a range of rows. Raises BadInput."""
    path = Path(path)
    if path.is_dir():
        prepared = (path / "labels.npy").is_file() or (path / "vae-sd").is_dir()
        images = Prepared(path) if prepared else Folder(path)
    elif not path.is_file():
        raise BadInput(f"there is no file or folder {path}")
    elif "arr_0" in (keys := keys_of(path)):
        images = Npz(path)
    else:
        raise BadInput(f"{path} holds {', '.join(sorted(keys)) or 'nothing'}, but no images under arr_0")
    if len(images) < 2:
        raise BadInput(f"{path}: a covariance needs at least two images, and there are {len(images)}")
    return images


def read_statistics(path):
    """{"pool": (mu, sigma), "spatial": (mu, sigma)} of an .npz with ADM's keys, or None. Raises BadInput."""
    if not Path(path).is_file() or "mu" not in (keys := keys_of(path)):
        return None
    if not {"sigma", "mu_s", "sigma_s"} <= keys:
        raise BadInput(f"{path} holds {', '.join(sorted(keys))}, but not all of mu, sigma, mu_s, sigma_s: "
                       f"pytorch-fid and clean-fid write such files, but they resize images in other ways "
                       f"than ADM, so that a FID against theirs is another number")
    found = {}
    for kind, end, d in (("pool", "", POOL), ("spatial", "_s", SPATIAL)):
        try:
            with np.load(path, allow_pickle=False) as file:
                mu, sigma = file[f"mu{end}"].astype(np.float64), file[f"sigma{end}"].astype(np.float64)
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise BadInput(f"{path}: mu{end} and sigma{end} cannot be read ({brief(e)})") from e
        if mu.shape != (d,) or sigma.shape != (d, d):
            raise BadInput(f"{path}: mu{end} is {mu.shape} and sigma{end} {sigma.shape}, "
                           f"not ({d},) and ({d}, {d})")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise BadInput(f"{path}: mu{end} or sigma{end} is not finite")
        found[kind] = mu, sigma
    return found


def open_reference(path):
    """(statistics or None, images or None) of a reference. Raises BadInput."""
    statistics = read_statistics(path)
    alone = statistics and "arr_0" not in keys_of(path)
    return statistics, None if alone else open_images(path)


class Generated(Images):
    """Samples of a checkpoint's EMA: batch i is a function of (seed, i), whatever the number of processes."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.model, made = haste.load_model(args.ckpt, args.model)
        haste.check_sampler(self.model, args.mode, args.num_steps)
        self.captions = self.open_captions() if isinstance(self.model, haste.MMDiT) else None
        if args.cfg_scale != 1:
            self.model.null_label       # raises BadInput for a model that has none
        self.vae_name = haste.decoder_of(made["vae"], args.vae) or "none: pixels"
        self.vae = haste.load_decoder(made["vae"], args, device)
        self.model.to(device)
        if args.compile:
            self.model.compile(dynamic=False)
        self.scale = made.get("scale", haste.VAE_SCALE)
        try:
            side = self.decode(torch.zeros_like(haste.seeded_noise(self.model, 1, 0, device))).shape[-1]
        except RuntimeError as e:
            raise BadInput(f"{self.vae_name} cannot decode what {args.ckpt} draws ({brief(e)})") from e
        self.shape, rng = (args.num_samples, side, side, 3), np.random.default_rng(args.seed)
        if self.captions:
            self.labels = np.resize(rng.permutation(len(self.captions)), args.num_samples)      # of images
            return
        if args.captions_from:
            raise BadInput(f"{args.ckpt} draws labels, not captions: leave --captions-from out")
        classes = self.model.y_embedder.num_classes
        if args.balanced:       # but in random order: sorted by class, they would spoil the splits of IS
            labels = rng.permutation(np.arange(args.num_samples) % classes)
        else:
            labels = rng.integers(classes, size=args.num_samples)
        self.labels = torch.from_numpy(labels).to(device)

    def open_captions(self):
        """The dataset whose images' first captions an MM-DiT draws. Raises BadInput."""
        if not self.args.captions_from or self.args.balanced:
            raise BadInput(f"{self.args.ckpt} draws captions: say --captions-from DIR, and not --balanced")
        data = haste.Data(self.args.captions_from)
        if not data.captions:
            raise BadInput(f"--captions-from {self.args.captions_from}: its images have labels, not captions")
        if self.model.null_context is None:     # of a checkpoint that is not ours
            self.model.null_context = data.captions.empty
        if self.model.null_context.shape != data.captions.empty.shape:
            raise BadInput(f"--captions-from {self.args.captions_from}: its captions are encoded otherwise "
                           f"than those that {self.args.ckpt} learned from")
        return data

    def conditions(self, rows):
        """The labels of these samples, (B,), or their captions, encoded, (B, T, 768)."""
        chosen = self.labels[rows.start:rows.stop]
        return self.captions[chosen, False]["labels"].to(self.device) if self.captions else chosen

    def decode(self, x):
        return haste.to_images(x, self.vae, self.scale)

    def __getitem__(self, rows):
        args, labels = self.args, self.conditions(rows)
        keys = np.random.SeedSequence((args.seed, rows.start)).generate_state(2, np.uint64) >> np.uint64(1)
        noise = haste.seeded_noise(self.model, len(rows), int(keys[0]), self.device)
        torch.manual_seed(int(keys[1]))      # of the SDE: the same key would bring the same numbers again
        with haste.autocast(args.precision, self.device)():
            x = haste.sample(self.model, noise, labels, args.num_steps, args.cfg_scale,
                             (args.guidance_low, args.guidance_high), args.mode)
        return self.decode(x)


# ---- 4. One pass over images -------------------------------------------------------------------------------

def read(images, requests, args):
    """images[rows] for each of the ranges requested: drawn here, or read by args.num_workers processes."""
    workers = 0 if isinstance(images, Generated) else args.num_workers
    return DataLoader(images, batch_size=None, sampler=requests, num_workers=workers)


class Gathered:
    """What a pass keeps of the features of n images: sums of a fixed size, and the pooled ones if wanted."""

    def __init__(self, n, device, keep_pool):
        home = torch.device("cpu") if device.type == "mps" else device      # MPS has no fp64
        self.pool, self.spatial = Moments(POOL, home), Moments(SPATIAL, home)
        self.score, self.kept, self.keep_pool, self.home = InceptionScore(n, home), [], keep_pool, home

    def sums(self):
        return [self.pool.n, self.pool.sum, self.pool.outer, self.spatial.n, self.spatial.sum,
                self.spatial.outer, self.score.p, self.score.entropy]

    def add(self, rows, pool, spatial, logits):
        self.pool.add(pool.to(self.home))
        self.spatial.add(spatial.to(self.home))
        self.score.add(logits.to(self.home), rows)
        if self.keep_pool:
            self.kept.append(pool.cpu())

    def pooled(self):
        return torch.cat(self.kept) if self.kept else torch.zeros(0, POOL)

    def merge(self):
        """Adds up the sums of all processes; the first gets all features."""
        if not dist.is_initialized():
            return
        for x in self.sums():
            dist.all_reduce(x)
        parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self.pooled(), parts)
        self.kept = parts or []

    def save(self, path, done):
        state = {"done": done, "sums": self.sums(), "kept": self.pooled()}
        write_file(path, lambda f: torch.save(state, f))

    def load(self, path):
        """How many batches the file at path holds, whose sums it takes over; 0 with a file that is torn."""
        if not path.is_file():
            return 0
        try:
            saved = haste.load_file(path)
        except BadInput as e:
            print(f"warning: {e}: starting anew", flush=True)
            return 0
        for x, y in zip(self.sums(), saved["sums"], strict=True):
            x.copy_(y)
        self.kept = [saved["kept"]]
        return saved["done"]

    def statistics(self):
        return {"pool": self.pool.statistics(), "spatial": self.spatial.statistics()}


def measure(images, net, args, rank, world, device, title, keep_pool=False, state=None, arrays=None):
    """Gathered of all images, of which each process takes every world-th batch.

    state: a file that lets a killed pass go on; arrays: a memory map (n, H, W, 3) that takes the images."""
    n, B = len(images), args.batch_size
    mine = [range(start, min(start + B, n)) for start in range(rank * B, n, world * B)]
    gathered = Gathered(n, device, keep_pool)
    done, saved = gathered.load(state) if state else 0, time.time()
    first = min(n, done * B * world)
    if first and rank == 0:
        show(f"resuming after {first:,} of {n:,} {title}", args)
    with tqdm(total=n, initial=first, desc=title, unit=" images", disable=rank > 0) as bar:
        for rows, batch in zip(mine[done:], read(images, mine[done:], args)):
            if arrays is not None:
                arrays[rows.start:rows.stop] = batch.permute(0, 2, 3, 1).cpu().numpy()
            gathered.add(rows, *net(batch.to(device)))
            done += 1
            bar.update(min(len(rows) * world, n - bar.n))       # the other processes are about as far
            if state and (time.time() - saved >= args.save_every or done == len(mine)):
                if arrays is not None:
                    arrays.flush()
                gathered.save(state, done)
                saved = time.time()
    gathered.merge()
    return gathered


# ---- 5. The evaluation -------------------------------------------------------------------------------------

def show(line, args):
    print(line + (f"   ({RANDOM})" if args.inception == "random" else ""), flush=True)


def write_npz(path, shape, images, **arrays):
    """An .npz of arrays, and of arr_0 (shape) uint8, whose parts come one by one and are not kept."""
    def write(f):
        with zipfile.ZipFile(f, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                described = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
                np.lib.format.write_array_header_1_0(file, described)
                for part in images:
                    file.write(np.ascontiguousarray(part))
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array)
    write_file(Path(path), write)


def must_be_writable(path):
    """Creates the folder of a file that will be written at the end. Raises BadInput where it cannot."""
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab"):
            pass
        part.unlink(missing_ok=True)      # another process may have been faster
        if Path(path).is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as e:
        raise BadInput(f"{path} cannot be written ({brief(e)})") from e


def make_ref(args, rank, world, device):
    """--make-ref: ADM's keys, from images; arr_0 is all of them, or 10,000 evenly spaced ones."""
    images = open_images(args.make_ref)
    must_be_writable(args.out)
    gathered = measure(images, load_inception(args, device), args, rank, world, device, "reference images")
    if rank == 0:
        (mu, sigma), (mu_s, sigma_s) = gathered.statistics().values()
        count = min(len(images), OF_REF)
        chosen = np.linspace(0, len(images) - 1, count).round().astype(int).tolist()
        parts = read(images, [range(i, i + 1) for i in chosen], args)
        parts = (part.permute(0, 2, 3, 1).numpy() for part in parts)
        write_npz(args.out, (count, *images.shape[1:]), parts, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
        show(f"{args.out}: statistics of {len(images):,} images, and {count:,} of them", args)


def load_inception(args, device):
    with haste.first_on_node():
        return Inception(args.inception).to(device)


def describe(args, samples, own):
    """All that a FID depends on: figures of which one of these differs cannot be compared."""
    protocol = {"samples": args.ckpt or args.samples, "number of samples": len(samples),
                "size": size_of(samples.shape), "reference": args.ref, "features": args.inception or WEIGHTS}
    if own:
        protocol["statistics"] = "the sample file's own mu and sigma, as ADM takes them"
    if args.ckpt:
        protocol |= {
            "weights": "EMA", "sampler": args.mode,
            "evaluations": 2 * args.num_steps - 1 if args.mode == "heun" else args.num_steps,
            "guidance": args.cfg_scale, "interval": [args.guidance_low, args.guidance_high],
            "VAE": samples.vae_name, "labels": "balanced" if args.balanced else "uniform at random",
            "seed": args.seed, "batch size": args.batch_size, "precision": args.precision}
        if samples.captions:
            protocol["labels"] = f"captions, the first of each image of {args.captions_from}, shuffled"
        if samples.model.guided:
            protocol["guided channels"] = samples.model.guided
    return protocol


# One CIFAR-10 model's FID was 5.12 with 50,000 samples and 9.75 with 5,000; the bias goes as 1 / n.
FID_SOURCE = "github.com/atong01/conditional-flow-matching/issues/111"
FID_BIAS = (9.75 - 5.12) / (1 / 5_000 - 1 / 50_000)


def warnings(samples, own, images_of_ref):
    """Sentences on what makes these figures incomparable with published ones."""
    n = len(samples)
    if images_of_ref is not None and images_of_ref.shape[1:3] != samples.shape[1:3]:
        yield f"samples are {size_of(samples.shape)}, reference images {size_of(images_of_ref.shape)}"
    if n < 50_000 and not own:
        lacks = f", no more than the {POOL:,} features, so the covariance lacks rank" if n <= POOL else ""
        yield (f"{n:,} samples{lacks}: FID is biased upwards, by a term in 1/n (Chong and Forsyth, 2020); a "
               f"CIFAR-10 model had 5.12 with 50,000 and 9.75 with 5,000 ({FID_SOURCE}), by which rule it "
               f"would have {5.12 + FID_BIAS * (1 / n - 1 / 50_000):.3g} with {n:,}")
    paths = samples.files.paths if isinstance(samples, Folder) else []
    if any(path.suffix.lower() in (".jpg", ".jpeg") for path in paths):
        yield "samples are JPEG files: FID sees what that compression did to them"
    if n > SPLIT and (isinstance(samples, Prepared) or len({path.parent for path in paths}) > 1):
        yield f"samples come folder by folder, as do the splits of {SPLIT:,} for IS, which is then too low"


def stamp(path):
    """What tells a file, or the files in a folder, from what was there before; None for what is not there."""
    files = sorted(p for p in Path(path).rglob("*") if p.is_file()) if Path(path).is_dir() else [Path(path)]
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()] or None


class Outputs:
    """Where the results go, and, beside a checkpoint's, what a killed run needs to go on.

    That is in files of which the name is hashed from all that decides the samples and their features: a run
    with other flags, another checkpoint of the same name, or another number of processes starts anew."""

    def __init__(self, args, protocol, shape, left_out, rank, world, device):
        self.args, self.shape = args, shape
        self.json, self.state, self.arrays = [Path(args.json)] if args.json else [], None, None
        states = []
        if args.ckpt:
            facts = [protocol, bool(left_out), world, device.type, args.save_npz,
                     *(path and stamp(path) for path in (args.ckpt, args.vae, args.inception))]
            if args.captions_from:
                facts.append(stamp(Path(args.captions_from) / "dataset.json"))
            key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
            folder, step = Path(args.ckpt).absolute().parent, Path(args.ckpt).stem
            run = folder.parent if folder.name == "checkpoints" else folder
            stem = run / "eval" / f"{step}-{args.mode}-{args.num_steps}-cfg-{args.cfg_scale:g}-{key}"
            self.json.append(Path(f"{stem}.json"))
            states = [Path(f"{stem}.{i}of{world}.state") for i in range(world)]
            self.state = states[rank]
        self.raw = Path(f"{args.save_npz}.{key}.npy") if args.save_npz else None
        if rank == 0:
            for path in self.json + [args.save_npz] * bool(args.save_npz):
                must_be_writable(path)
            if self.raw:
                self.make_raw(states)
        barrier()
        if self.raw:
            self.arrays = np.load(self.raw, mmap_mode="r+")

    def make_raw(self, states):
        """The array that takes the samples as they are drawn. Where it is not yet, states cannot hold."""
        size = np.prod(self.shape)
        if self.raw.is_file() and self.raw.stat().st_size > size:
            return
        free = shutil.disk_usage(self.raw.parent).free
        if free < 2 * size:     # once as they are drawn, once in the .npz
            raise BadInput(f"--save-npz {self.args.save_npz} takes {2 * size / 1e9:.1f} GB while it is "
                           f"written, and {free / 1e9:.1f} GB are free")
        for state in states:
            state.unlink(missing_ok=True)
        haste.new_array(self.raw, np.uint8, self.shape)

    def write(self, results, protocol):
        report = json.dumps(results | {"protocol": protocol}, indent=1).encode()
        for path in self.json:
            write_file(path, lambda f: f.write(report))
        if self.raw:
            write_npz(self.args.save_npz, self.shape, self.arrays)
            self.raw.unlink()

    def finish(self):
        barrier()       # what a killed run needs is kept until the results are written
        if self.state:
            self.state.unlink(missing_ok=True)


def why_no_manifold(args, samples, images_of_ref):
    """The reason to leave precision and recall out, or None."""
    if args.no_prec_recall:
        return "--no-prec-recall"
    if images_of_ref is None:
        return f"{args.ref} holds statistics but no images"
    few = min(len(samples), len(images_of_ref)) <= NEIGHBOURS
    return f"they take more than {NEIGHBOURS} images on either side" if few else None


def compare(samples, own, reference, of_ref):
    """The metrics of samples, Gathered, against the reference's statistics and images (Gathered, or None)."""
    statistics = own or samples.statistics()
    results = {"fid": frechet_distance(*statistics["pool"], *reference["pool"]),
               "sfid": frechet_distance(*statistics["spatial"], *reference["spatial"]),
               "is": samples.score.score()}
    if of_ref:
        x, y = samples.pooled().to(samples.home), of_ref.pooled().to(of_ref.home)
        results |= {"precision": inside(x, y, radii(y)), "recall": inside(y, x, radii(x))}
    return results


def evaluate(args):
    """Measures args.ckpt or args.samples against args.ref; prints protocol and metrics, and returns these."""
    rank, world, device = haste.setup(args)
    args.batch_size = args.batch_size or (64 if device.type == "cuda" else 32)
    # TF32, on by default for convolutions, moves FID in the third digit.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if args.make_ref:
        return make_ref(args, rank, world, device)

    # --- what is compared, and where to: mistakes are told here, before the hours of sampling
    reference, images_of_ref = open_reference(args.ref)
    samples = Generated(args, device) if args.ckpt else open_images(args.samples)
    own = read_statistics(args.samples) if args.samples else None
    left_out = why_no_manifold(args, samples, images_of_ref)
    protocol = describe(args, samples, own)
    outputs = Outputs(args, protocol, samples.shape, left_out, rank, world, device)
    net = load_inception(args, device)
    if rank == 0:
        for name, value in protocol.items():
            show(f"{name:18} {value}", args)
        for warning in warnings(samples, own, images_of_ref):
            show(f"warning: {warning}", args)

    # --- features: first the reference's, in which there may still be a broken image
    where, of_ref = (rank, world, device), None
    if reference is None or not left_out:
        of_ref = measure(images_of_ref, net, args, *where, "reference images", not left_out)
        reference = reference or of_ref.statistics()
    of_samples = measure(samples, net, args, *where, "samples", not left_out, outputs.state, outputs.arrays)

    # --- metrics
    results = None
    if rank == 0:
        results = compare(of_samples, own, reference, None if left_out else of_ref)
        for name, value in results.items():
            show(f"{name:18} {value:.6g}", args)
        if left_out:
            show(f"precision, recall  left out: {left_out}", args)
        outputs.write(results, protocol)
    outputs.finish()
    return results


# ---- 6. The demo: letters that Pillow draws, a teacher trained on them, a judge that is neither's ----------

LETTERS, GLYPH, PATCH = "ABCEHKRSTX", 24, 4
DEMO_STEPS = {"SiT": "--tau 350 --max-train-steps 700", "DiT": "--tau 700 --max-train-steps 1400",
              "MMDiT": "--tau 700 --max-train-steps 1400"}
COLOURS = {"red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 70, 215), "orange": (245, 145, 30),
           "white": (240, 240, 240), "black": (20, 20, 20)}


def render_glyphs(n, seed):
    """n letters, bright on dark, of random colours, sizes, places and angles: images (n, 3, 24, 24) uint8,
    labels (n,), masks (n, 24, 24) in [0, 1]."""
    rng, images, masks = np.random.default_rng(seed), [], []
    labels = rng.integers(len(LETTERS), size=n)
    for label in labels:
        layer = Image.new("L", (2 * GLYPH, 2 * GLYPH))      # drawn at twice the size, for smooth edges
        font, place = ImageFont.load_default(int(rng.integers(38, 47))), GLYPH + rng.uniform(-3, 3, 2)
        ImageDraw.Draw(layer).text(tuple(place), LETTERS[label], 255, font, anchor="mm", stroke_width=2)
        layer = layer.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
        masks.append(np.asarray(layer.resize((GLYPH, GLYPH), Image.Resampling.BOX), np.float32) / 255)
        ink, paper = rng.uniform(140, 255, (3, 1, 1)), rng.uniform(0, 90, (3, 1, 1))
        images.append((masks[-1] * ink + (1 - masks[-1]) * paper).astype(np.uint8))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(labels), torch.from_numpy(np.stack(masks))


def captioned_glyphs(n, seed):
    """render_glyphs' letters in two named colours: images, labels, masks, and a list of n captions."""
    _, labels, masks = render_glyphs(n, seed)
    n, rng = len(labels), np.random.default_rng((seed, 1))
    pairs = [rng.choice(list(COLOURS), 2, replace=False) for _ in range(n)]
    ink, paper = torch.tensor([[COLOURS[name] for name in pair] for pair in pairs])[..., None, None].unbind(1)
    images = (masks[:, None] * ink + (1 - masks[:, None]) * paper).to(torch.uint8)
    captions = [f"{'an' if ink == 'orange' else 'a'} {ink} {LETTERS[label]} on {paper}"
                for (ink, paper), label in zip(pairs, labels)]
    return images, labels, masks, captions


def write_images(folder, images, labels, captions=(), classes=LETTERS):
    for i, (image, label) in enumerate(zip(images, labels)):
        path = folder / classes[label] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        if captions:
            path.with_suffix(".txt").write_text(captions[i])


def fit(net, loss_of, inputs, steps, title):
    """Some hundred steps of AdamW with a cosine decay, enough for the demo's teacher and its judge."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in (bar := tqdm(range(steps), desc=title, dynamic_ncols=True)):
        i = torch.randint(len(inputs[0]), (64,), generator=torch.Generator().manual_seed(step))
        loss = loss_of(*(x[i] for x in inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return net.eval().requires_grad_(False)


def fit_teacher(path, images, labels, masks, patch=PATCH):
    """A ViT of 4 blocks learns to say of each pixel, masks (n, R, R), to which class, or none, it belongs."""
    torch.manual_seed(0)
    R, kinds = images.shape[-1], 2 + int(labels.max())
    config = dict(img_size=R, patch_size=patch, embed_dim=96, depth=4, num_heads=4, num_classes=0)
    vit, side = VisionTransformer(**config), R // patch
    head, normal = nn.Linear(96, patch ** 2 * kinds), haste.Teacher(copy.deepcopy(vit), (), side)

    def pixel_loss(x, y, mask):
        tokens = vit.forward_features((x - normal.mean) / normal.std)[:, 1:]
        kind = (mask > 0.5) * (1 + y[:, None, None])                                        # (B, R, R)
        kind = kind.reshape(-1, side, patch, side, patch).transpose(2, 3).flatten()         # patch by patch
        return F.cross_entropy(head(tokens).reshape(-1, kinds), kind)

    fit(nn.ModuleList([vit, head]), pixel_loss, (images, labels, masks), 400, "the demo's teacher")
    write_file(path, lambda f: torch.save({"config": config, "model": vit.state_dict()}, f))


class Judge(nn.Module):
    """A small convolutional classifier that teacher and student never meet: uint8 images (B, 3, R, R) ->
    features (B, 64), logits (B, classes)."""

    def __init__(self, classes):
        super().__init__()
        layers = [layer for c, d in ((3, 32), (32, 64), (64, 64)) for layer in (
            nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU(), nn.MaxPool2d(2))]
        self.body = nn.Sequential(*layers[:-1], nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(576, 64))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, classes))

    def forward(self, images):
        features = self.body(images / 127.5 - 1)
        return features, self.head(features)

    def right(self, images, labels):
        """The share of images that it reads as their labels."""
        read = torch.cat([self(part)[1].argmax(1) for part in images.split(250)])
        return (read == labels).float().mean().item()


def fit_judge(images, labels, classes):
    torch.manual_seed(1)
    judge = Judge(classes)
    return fit(judge, lambda x, y: F.cross_entropy(judge(x)[1], y), (images, labels), 300, "the judge")


def write_rows(path, rows):
    """A picture of rows of 20 small images each, uint8 (n, 3, R, R), below their captions."""
    picture = Image.new("RGB", (1052, 84 * len(rows) + 8), "white")
    for i, (caption, row) in enumerate(rows):
        ImageDraw.Draw(picture).text((8, 84 * i + 6), caption, "black", ImageFont.load_default(15))
        row = Image.fromarray(make_grid(row[:20], 20, padding=1, pad_value=255).permute(1, 2, 0).numpy())
        picture.paste(row.resize((1040, 54), Image.Resampling.NEAREST), (6, 84 * i + 28))
    write_file(path, lambda f: picture.save(f, "PNG"))


def without(argv, *names):
    """The flags without these and the value of each."""
    kept = zip(argv, ["", *argv])
    return [a for a, before in kept if a.split("=")[0] not in names and before not in names]


def demo(args, given):
    """--demo: draws letters, fits a teacher, then runs ordinary commands; other flags go to the training."""
    given = [flag for flag in given if flag not in ("--demo", "--compare")]
    if args.compare:
        ours = "--model", "--seeds", "--seed", "--exp-name", "--data-dir"
        return contest(args, without(given, *ours))
    kind, _, _ = args.model.partition("-")
    home, mode = Path(args.output_dir) / args.exp_name, "ddpm" if kind == "DiT" else "sde"
    render, at = captioned_glyphs if kind == "MMDiT" else render_glyphs, shlex.quote(str(home))
    images, labels, masks, *captions = render(4000, seed=0)
    write_images(home / "glyphs", images, labels, *captions)
    if not (home / "teacher.pt").is_file():
        fit_teacher(home / "teacher.pt", images, labels, masks)

    def command(line, *more):
        argv = [*shlex.split(line), *more]
        print("\n$ python haste.py", shlex.join(argv))
        return haste.parse(argv)

    plain = f"--resolution {GLYPH} --vae none" + " --text-encoder words" * bool(captions)
    haste.prepare(command(f"--prepare {at}/glyphs --data-dir {at}/data {plain}"))
    code = haste.train(command(
        f"--model {args.model} --data-dir {at}/data --teacher {at}/teacher.pt "
        f"--output-dir {shlex.quote(args.output_dir)} --exp-name {shlex.quote(args.exp_name)} "
        f"--batch-size 64 --learning-rate 2e-3 --ema-decay 0.99 {DEMO_STEPS[kind]} --checkpointing-steps 350 "
        f"--sampling-steps 350 --cfg-scale 2 --log-every 50 --num-workers 0",
        *without(given, "--model", "--exp-name")))
    if code:
        return code
    saved = sorted((home / "checkpoints").glob("[0-9]*.pt"))
    what = ["--captions", *captions[0][:40]] if captions else ["--labels", *(str(i % 10) for i in range(40))]
    last = shlex.quote(str(saved[-1]))
    haste.sample_from(command(f"--sample {last} --mode {mode} --num-steps 50 --cfg-scale 2 "
                              f"--out {at}/letters.png", *what))

    # --- held-back letters against samples: as features see them, and as a network sees them that had no part
    real, of, _, *captions = render(100, seed=2)
    write_images(home / "real", real, of, *captions)
    line = (f"--ckpt {last} --ref {at}/real --inception random --num-samples 100 --num-steps 50 "
            f"--mode {mode} --cfg-scale 2 --json {at}/metrics.json")
    if captions:
        haste.prepare(command(f"--prepare {at}/real --data-dir {at}/real-data {plain}"))
        line += f" --captions-from {at}/real-data"
    print("\n$ python evaluate.py", line)
    main(shlex.split(line))
    judge_letters(home, saved, mode, render)


@torch.no_grad()
def judge_letters(home, checkpoints, mode, render):
    """Prints how many letters the judge reads right, real and each checkpoint's, and draws home/demo.png."""
    classes, (real, of, _, *captions) = len(LETTERS), render(500, seed=2)
    with torch.enable_grad():
        judge = fit_judge(*render(4000, seed=1)[:2], classes)
    wanted = of[:100] if captions else torch.arange(100) % classes
    labels = haste.Words()(captions[0][:100]) if captions else wanted
    two_each = torch.stack([torch.nonzero(of == c)[:2, 0] for c in range(classes)]).T.flatten()
    rows = [(f"real letters: the judge reads {judge.right(real, of):.0%} right", real[two_each])]
    for path in checkpoints:
        model, _ = haste.load_model(path, None)
        noise = haste.seeded_noise(model, len(wanted), 0, "cpu")
        torch.manual_seed(1)
        drawn = haste.to_images(haste.sample(model, noise, labels, steps=50, cfg_scale=2.0, mode=mode))
        step, tau = int(path.stem), haste.load_file(path)["tau"]
        phase = "I" if tau is None or step <= tau else "II"
        right = judge.right(drawn, wanted)
        rows.append((f"step {step}, phase {phase}: the judge reads {right:.0%} right", drawn))
    print("\n".join(caption for caption, _ in rows))
    write_rows(home / "demo.png", rows)
    print(f"{home}/demo.png shows them; the metrics are in {home}/metrics.jsonl and {home}/metrics.json")


# ---- 7. How fast a step is: haste.py --bench ---------------------------------------------------------------

PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362}     # dense bf16 TFLOP/s


class Plain:
    """Before a backbone's class: its forward with no alignment in its path, as fast as phase II has to be."""

    def forward(self, x, t, y):
        h, c, *text = self.embed(x, t, y)
        for block in self.blocks:
            h, _, *text = block(h, c, *text)
        return self.unpatchify(self.final_layer(h, c))


def plain_step(learner, x0, eps, t, labels):
    """A step of SiT or DiT as one would write it who has never heard of alignment."""
    diffusion = haste.diffusion_of(learner.model)
    x_t, t = diffusion.noised(x0, eps, t)
    with learner.autocast():
        v = learner.net(x_t, t, labels)
    loss = diffusion.loss(v.float(), x0, eps, x_t, t)
    learner.scaler.scale(loss).backward()
    learner.scaler.unscale_(learner.optimizer)
    nn.utils.clip_grad_norm_(learner.model.parameters(), learner.args.max_grad_norm)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    learner.update_ema(*learner.followed, None)


def tflop(call, *given):
    """What a call multiplies and adds; attention counts as two products of matrices, and nothing twice."""
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), \
            FlopCounterMode(display=False) as counter:
        call(*given)
    return counter.get_total_flops() / 1e12


def peak_memory(device, reset=False):
    """The most GiB held since the last reset: of the GPU's memory, or on Linux of this process's, or None."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if not Path("/proc/self/clear_refs").exists():
        return None
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2 ** 20


class Bench:
    """What haste.py --bench times: the plain backbone and ours, on made-up data. A row of the table is a
    learner, and a call for the first n images."""

    def __init__(self, args, rank, world, device):
        self.args, self.device, self.cuda = args, device, device.type == "cuda"
        self.B, self.R = args.batch_size // world, args.resolution or 256
        if args.batch_size % world or args.gradient_accumulation_steps > 1:
            raise BadInput(f"--bench times a whole batch, in equal parts on {world} processes: choose "
                           f"another --batch-size, and leave --gradient-accumulation-steps out")
        kind, patch, row = haste.look_up(args.model)
        S, n, blocks = self.R // 8, self.R // 8 // patch, args.teacher_blocks or row.teacher_blocks
        aligned = args.attention_blocks or row.attention_blocks
        if len(aligned) != len(blocks):
            raise BadInput("--attention-blocks and --teacher-blocks must be as many")
        self.plain_name = f"plain {kind.__name__}"
        with haste.first_on_node():
            try:
                self.teacher = haste.load_teacher(args.teacher, n, blocks, args.teacher_repo)
                self.shown = args.teacher
            except BadInput:
                if args.teacher not in haste.DINOV2:
                    raise
                vit = VisionTransformer(img_size=14 * n, patch_size=14, num_classes=0, init_values=1.0)
                self.teacher, self.shown = haste.Teacher(vit, blocks, n), "a ViT-B/14 with random weights"
        self.teacher.to(device)
        sizes = dict(input_size=S, teacher_dim=self.teacher.dim, attention_blocks=aligned,
                     feature_block=args.encoder_depth or row.feature_block)
        self.plain, self.ours = (
            haste.Learner(haste.build_model(args.model, kind=kind, **sizes).to(device), args, device)
            for kind in (type("PlainBackbone", (Plain, kind), {}), kind))
        if args.compile:
            self.ours.ema.compile(dynamic=False)
        g = torch.Generator(device).manual_seed(0)
        x0, eps = torch.randn(2, self.B, 4, S, S, device=device, generator=g)
        t, labels = torch.rand(self.B, device=device, generator=g), torch.arange(self.B, device=device) % 1000
        if kind is haste.MMDiT:
            labels = torch.randn(self.B, 77, haste.TEXT_WIDTH, device=device, generator=g)
        self.given = x0, eps, t, labels
        shape = self.B, 3, self.R, self.R
        self.images = torch.randint(256, shape, device=device, generator=g, dtype=torch.uint8)
        self.rows = {
            self.plain_name: (self.plain, lambda n: plain_step(self.plain, *self.first(n))),
            "phase I": (self.ours, lambda n: self.ours.step(*self.first(n), self.images[:n], self.teacher)),
            "phase II": (self.ours, lambda n: self.ours.step(*self.first(n))),
            "sampling": (self.ours, lambda n: self.evaluate(n, 1)),
            "sampling, guided": (self.ours, lambda n: self.evaluate(n, 2))}

    def first(self, n):
        return [x[:n] for x in self.given]

    @torch.no_grad()
    def evaluate(self, n, times):
        x, _, t, labels = self.first(n)
        with self.ours.autocast():
            self.ours.ema(x.repeat(times, 1, 1, 1), t.repeat(times), torch.cat(times * [labels]))

    def synchronize(self):
        getattr(torch, self.device.type).synchronize()

    def time(self, name, steps):
        """(seconds a step, GiB: the row's own weights, EMA and optimizer, and above that, its steps')."""
        learner, call = self.rows[name]
        learner.wrap(projector=name == "phase I")
        call(self.B)        # the first after a switch compiles, or builds DDP's buckets
        self.synchronize()
        tensors = [*learner.model.parameters(), *learner.ema.parameters(),
                   *(x for state in learner.optimizer.state.values() for x in state.values())]
        own, held = sum(x.nbytes for x in tensors) / 2 ** 30, peak_memory(self.device, reset=True)
        began = time.perf_counter()
        for _ in range(steps):
            call(self.B)
        self.synchronize()
        return (time.perf_counter() - began) / steps, held and own + peak_memory(self.device) - held

    def count(self):
        """{row: TFLOP of one image}, and of teacher and projector alone."""
        counted = {}
        for name, (learner, call) in self.rows.items():
            learner.wrap(projector=name == "phase I")
            counted[name] = tflop(call, 1)
        weights = sum(p.numel() for p in self.ours.model.projectors.parameters() if p.ndim == 2)
        tokens = self.teacher.grid ** 2     # each weight serves forward, for its gradient, for its input's
        return counted, tflop(self.teacher, self.images[:1]) + 3 * 2 * tokens * weights / 1e12


def bench(args):
    """haste.py --bench: training steps of the plain model, phase I and phase II, and of the sampler,
    in turns, so that a noisy machine favours none. Prints a table, and writes it to args.json."""
    rank, world, device = haste.setup(args)
    b = Bench(args, rank, world, device)
    counted, added = b.count()
    rounds, steps = (20, 5) if b.cuda else (7, 1)
    times, memory = {name: [] for name in b.rows}, {}
    for i in tqdm(range(rounds + 1), desc="rounds", disable=rank > 0):
        for name in b.rows:
            seconds, memory[name] = b.time(name, steps)
            times[name] += [seconds] if i else []       # the first round warms up
    if rank:
        return

    name = torch.cuda.get_device_name() if b.cuda else f"{torch.get_num_threads()} CPU threads"
    name = "MPS" if b.device.type == "mps" else name
    peak = next((p for key, p in PEAKS.items() if key in name), None) if args.precision != "fp32" else None
    report = {"model": args.model, "device": f"{world} x {name}", "batch a device": b.B, "resolution": b.R,
              "precision": args.precision, "compiled": args.compile, "teacher": b.shown,
              "torch": torch.__version__}
    print("\n".join(f"{key:16} {value}" for key, value in report.items()))
    print(f"{'':18}{'ms (low-high)':>26}{'images/s':>10}{'TFLOP':>9}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>7}"
          f"{'over plain':>12}")
    rows = report["rows"] = {}
    for name, x in times.items():
        (low, ms, high), work = 1e3 * np.quantile(x, (0, 0.5, 1)), b.B * counted[name]
        over = np.median(np.divide(x, times[b.plain_name]))      # of neighbours in time
        rate, speed = 1e3 * world * b.B / ms, 1e3 * work / ms
        rows[name] = {"ms": ms, "ms_low": low, "ms_high": high, "images_per_sec": rate,
                      "tflop": work, "tflop_per_sec": speed, "mfu": peak and speed / peak,
                      "peak_memory_gib": memory[name], "over_plain": over}
        spread = f"{ms:.1f} ({low:.1f}-{high:.1f})"
        mfu, gib = f"{speed / peak:.1%}" if peak else "-", f"{memory[name]:.2f}" if memory[name] else "-"
        print(f"{name:18}{spread:>26}{rate:>10.1f}{work:>9.3f}{speed:>9.3f}{mfu:>7}{gib:>7}{over:>12.3f}")
    report["phase2_over_plain"] = rows["phase II"]["over_plain"]
    report["phase1_over_expected"] = rows["phase I"]["over_plain"] / (1 + added / counted[b.plain_name])
    print(f"phase II over {b.plain_name}: {report['phase2_over_plain']:.3f}; phase I over it with the "
          f"counted FLOP of teacher and projector: {report['phase1_over_expected']:.3f}")
    if args.json:
        write_file(Path(args.json), lambda f: f.write(json.dumps(report, indent=1).encode()))


# ---- 8. The paper's claims, in small: haste.py --demo --compare --------------------------------------------

# All start from the same weights, with the same batches and noise. "never" measures the angle as "auto"
# does, and never heeds it: no cosine lies below -1.
VARIANTS = {"plain": "--tau 0", "REPA": "--tau never --lambda-a 0", "attention": "--tau never --lambda-r 0",
            "never": "--tau auto --tau-cosine -1", "HASTE": "", "auto": "--tau auto"}
PROTOCOL = ("--batch-size 64 --learning-rate 2e-3 --ema-decay 0.99 --max-train-steps 1500 --tau 750 "
            "--tau-from 150 --tau-every 150 --tau-images 256 --log-every 50 --sampling-steps 0 "
            "--num-workers 0")
MEASURED, DRAWN = 5, 1000       # times in a run, and at most so many samples each time


def three_parts(data_dir):
    """What is trained on, what the judge learns from, what is held back, each (images, labels, masks), and
    the classes' names: letters of three seeds, or of a dataset twice its three quarters and the rest.
    Raises BadInput."""
    if data_dir is None:
        sets = ((4000, 0), (4000, 1), (2 * DRAWN, 2))
        return [render_glyphs(n, seed) for n, seed in sets], LETTERS
    data = haste.Data(data_dir)
    if data.vae or data.captions or len(data) < 20:
        raise BadInput(f"--compare takes 20 images and more, as pixels, with labels, and {data_dir} has "
                       f"others: --prepare SRC --vae none makes such a dataset")
    order = np.random.default_rng(0).permutation(len(data))
    batches = [data[part, True] for part in np.split(order, [len(data) * 3 // 4])]
    train, rest = ((b["images"], b["labels"], torch.ones(b["images"][:, 0].shape)) for b in batches)
    if missing := set(range(len(data.classes))) - set(train[1].tolist()):
        raise BadInput(f"{data_dir}: three quarters of its images show none of class {min(missing)}")
    return [train, train, rest], [f"{c:05d}" for c in range(len(data.classes))]


def statistics(judge, images):
    """Mean (64,) and covariance (64, 64) of the judge's features."""
    moments = Moments(64, "cpu")
    for part in images.split(250):
        moments.add(judge(part)[0])
    return moments.statistics()


@torch.no_grad()
def contend(run, argv, judge_file):
    """One run of the comparison: it trains, then the judge measures samples of its checkpoints."""
    with torch.enable_grad():
        haste.main(argv)
    args, results, saved = haste.parse(argv), judged(run), haste.load_file(judge_file)
    device, judge = haste.setup(args)[2], Judge(saved["classes"]).eval()
    judge.load_state_dict(saved["model"])
    for step in range(args.checkpointing_steps, args.max_train_steps + 1, args.checkpointing_steps):
        if str(step) in results:
            continue
        model, _ = haste.load_model(run / "checkpoints" / f"{step:07d}.pt", None)
        noise = haste.seeded_noise(model.to(device), len(saved["labels"]), args.seed, device)
        is_flow = haste.diffusion_of(model) is haste.Flow
        how = {"mode": "heun", "steps": 13} if is_flow else {"mode": "ddpm", "steps": 50}
        torch.manual_seed(args.seed + 1)
        parts = zip(noise.split(250), saved["labels"].to(device).split(250))
        images = [haste.to_images(haste.sample(model, *part, **how)) for part in parts]
        images = torch.cat(images).cpu()
        haste.write_grid(run / "samples" / f"{step:07d}.png", images[:20], 20)
        reference = (x.numpy() for x in saved["reference"])
        results[str(step)] = {"distance": frechet_distance(*statistics(judge, images), *reference),
                              "right": judge.right(images, saved["labels"])}
        write_json(run / "judged.json", results)


def lines_of(run):
    path = run / "metrics.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines() if x.endswith("}")] if path.is_file() else []


def judged(run):
    return read_json(run / "judged.json") if (run / "judged.json").is_file() else {}


def how_far(run):
    """Steps trained, and as many again when they are judged."""
    return sum(line["step"] for line in lines_of(run)[-1:]) + max(map(int, judged(run)), default=0)


def contend_alone(job, threads, gpu):
    """contend(*job) in a process of its own, which ends with this one, its words in a file."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    job[0].mkdir(parents=True, exist_ok=True)
    with open(job[0] / "log.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(threads)
    os.environ["LOCAL_RANK"] = str(gpu)
    contend(*job)


def run_all(jobs, last, on_gpu, caught):
    """Runs contend(*job) for each job, to step `last`, as many at once as there are GPUs or cores; the bar
    counts each step twice, trained and judged. Returns AGAIN where a signal stopped it. Raises Failure."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = torch.cuda.device_count() if on_gpu else cores
    spawn, threads = multiprocessing.get_context("spawn"), max(1, cores // at_once)
    waiting = [job for job in jobs if len(judged(job[0])) < MEASURED]
    running, shown = {}, set()      # {number of the GPU: (run, process)}
    bar = tqdm(total=2 * last * len(jobs), initial=sum(how_far(run) for run, *_ in jobs), unit=" steps",
               dynamic_ncols=True)
    try:
        while (waiting or running) and not caught:
            while waiting and len(running) < at_once:
                slot = min(set(range(at_once)) - running.keys())
                job = waiting.pop(0)
                running[slot] = job[0], spawn.Process(target=contend_alone, args=(job, threads, slot))
                running[slot][1].start()
            time.sleep(1)
            for run, *_ in jobs:
                for step, result in judged(run).items():
                    if (run, step) not in shown:
                        shown.add((run, step))
                        bar.write(f"{run.parent.name} {run.name:9} step {step:>5}: distance "
                                  f"{result['distance']:6.2f}, {result['right']:.0%} right")
            bar.update(max(sum(how_far(run) for run, *_ in jobs) - bar.n, 0))
            for slot, (run, process) in list(running.items()):
                if process.exitcode is not None:
                    del running[slot]
                    if process.exitcode and not caught:
                        raise haste.Failure(f"a run ended with exit code {process.exitcode}, {run}/log.txt "
                                            f"says why: the same command goes on")
    finally:
        bar.close()
        for _, process in running.values():
            process.terminate()     # a run that trains makes a checkpoint first
        for _, process in running.values():
            process.join()
    return haste.AGAIN if caught else None


def contest(args, given):
    """haste.py --demo --compare: trains VARIANTS from the same weights, with the same batches and noise, has
    the judge measure samples of each on the way, and writes compare.json, a table, and pictures."""
    if args.model.startswith("MMDiT"):
        raise BadInput("--compare draws labels: choose a SiT or a DiT")
    if {flag.split("=")[0] for flag in given} & {"--keep", "--checkpointing-steps"}:
        raise BadInput("--compare has checkpoints of its own: leave --keep and --checkpointing-steps out")
    home, patch = Path(args.output_dir) / args.exp_name, haste.look_up(args.model)[1]
    common = ["--model", args.model, "--output-dir", args.output_dir, "--data-dir", f"{home}/data",
              "--teacher", f"{home}/teacher.pt", *PROTOCOL.split(), *given]
    settled = haste.parse(common)
    last, on_gpu = settled.max_train_steps, haste.setup(settled)[2].type == "cuda"
    if last % MEASURED:
        raise BadInput(f"--max-train-steps {last} does not divide by {MEASURED}, the times that are measured")
    common += ["--checkpointing-steps", str(last // MEASURED)]
    protocol = {"flags": common, "variants": VARIANTS, "data": args.data_dir or "letters", "judged":
                f"at most {DRAWN} EMA samples, 25 evaluations (Heun; DiT: ddpm, 50), no guidance"}
    with haste.exclusive(home):
        ((images, labels, masks), judges, rest), classes = three_parts(args.data_dir)
        if (home / "protocol.json").is_file() and read_json(home / "protocol.json") != protocol:
            raise BadInput(f"{home} holds a comparison with other flags: delete it, or name another "
                           f"--exp-name")

        # --- data, teacher, judge
        write_json(home / "protocol.json", protocol)
        write_images(home / "train", images, labels, classes=classes)
        haste.prepare(haste.parse(["--prepare", f"{home}/train", "--data-dir", f"{home}/data",
                                   "--vae", "none", "--resolution", str(images.shape[-1])]))
        haste.settle(settled, haste.Data(home / "data"), 1)
        if not (home / "teacher.pt").is_file():
            fit_teacher(home / "teacher.pt", images, labels, masks, patch)
        haste.load_teacher(settled.teacher, settled.grid, settled.teacher_blocks, settled.teacher_repo)
        if not (home / "judge.pt").is_file():
            judge, n = fit_judge(*judges[:2], len(classes)), min(DRAWN, len(rest[0]) // 2)
            reference, other = (statistics(judge, part) for part in rest[0][:2 * n].split(n))
            state = {"model": judge.state_dict(), "reference": [torch.from_numpy(x) for x in reference],
                     "classes": len(classes), "labels": rest[1][:n], "right": judge.right(*rest[:2]),
                     "floor": frechet_distance(*other, *reference)}
            write_file(home / "judge.pt", lambda f: torch.save(state, f))

        # --- the runs: those that measure angles take longest, and go first
        jobs, seeds = [], range(args.seed, args.seed + (args.seeds or 1))
        for seed, name in itertools.product(reversed(seeds), reversed(VARIANTS)):
            argv = [*common, *VARIANTS[name].split(), "--seed", str(seed),
                    "--exp-name", f"{args.exp_name}/seed{seed}/{name}"]
            print("$ python haste.py", shlex.join(argv))
            jobs.append((home / f"seed{seed}" / name, argv, home / "judge.pt"))
        with haste.stop_signals() as caught:
            if code := run_all(jobs, last, on_gpu, caught):
                print("stopped: the same command goes on")
                return code
        report(home, protocol, rest[0])


def report(home, protocol, real):
    """Writes compare.json, prints its table, and draws samples at equal steps, and the curves, of all seeds
    that are complete."""
    seeds = sorted(int(folder.name[4:]) for folder in home.glob("seed*")
                   if all(len(judged(folder / name)) == MEASURED for name in VARIANTS))
    run = {(name, seed): home / f"seed{seed}" / name for name in VARIANTS for seed in seeds}
    results = {name: {seed: judged(run[name, seed]) for seed in seeds} for name in VARIANTS}
    angles = {seed: [line for line in lines_of(run["never", seed]) if "cosine" in line] for seed in seeds}
    stopped = {seed: haste.load_file(max((run["auto", seed] / "checkpoints").glob("*.pt")))["tau"]
               for seed in seeds}
    saved = haste.load_file(home / "judge.pt")
    write_json(home / "compare.json", {
        "protocol": protocol, "floor": saved["floor"], "judge_right": saved["right"], "runs": results,
        "auto_stopped_at": stopped, "angles": angles})

    # --- the table: means, and standard deviations, over seeds
    steps = list(results["plain"][seeds[0]])

    def over_seeds(name, step, what):
        x = np.array([results[name][seed][step][what] for seed in seeds])
        return x.mean(), x.std(ddof=min(1, len(x) - 1))

    def cell(name, step):
        (d, d_sd), (r, r_sd) = (over_seeds(name, step, what) for what in ("distance", "right"))
        if len(seeds) == 1:
            return f"{d:.2f}, {r:.0%}"
        return f"{d:.2f} ± {d_sd:.2f}, {100 * r:.0f} ± {100 * r_sd:.0f}%"

    rows = [["steps", *VARIANTS], (1 + len(VARIANTS)) * ["---"]]
    rows += [[step, *(cell(name, step) for name in VARIANTS)] for step in steps]
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    print(f"\nFrechet distance of samples, and the share that the judge reads right; seeds {seeds}. Of real "
          f"images: {saved['floor']:.3f}, {saved['right']:.0%}. auto stopped at {stopped}")

    # --- the pictures
    rows = [("real", real)]
    for step, name in itertools.product((steps[1], steps[-1]), VARIANTS):
        told, path = results[name][seeds[0]][step], run[name, seeds[0]] / "samples" / f"{int(step):07d}.png"
        rows.append((f"step {step}, {name}: distance {told['distance']:.2f}, {told['right']:.0%} read right",
                     torch.tensor(haste.read_image(path))))
    write_rows(home / "samples.png", rows)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"{home}/samples.png, compare.json; the curves need matplotlib: pip install matplotlib")
    figure = Figure((15, 4.5), layout="constrained")
    distance, right, angle = figure.subplots(1, 3)
    x = [int(step) for step in steps]
    for axis, what, title in (distance, "distance", "Frechet distance"), (right, "right", "share read right"):
        for name in VARIANTS:
            mean, sd = np.array([over_seeds(name, step, what) for step in steps]).T
            axis.errorbar(x, mean, sd, capsize=3, label=name)
        axis.set(xlabel="step", title=title)
    distance.set_yscale("log")
    distance.axhline(saved["floor"], color="grey", linestyle=":", label="real images")
    distance.legend()
    for t in ("", *haste.TRIGGER_TIMES):
        key = f"cosine_t{t}" if t else "cosine"
        curves = np.array([[line[key] for line in angles[seed]] for seed in seeds]).reshape(len(seeds), -1)
        angle.plot([line["step"] for line in angles[seeds[0]]], curves.mean(0),
                   label=f"t = {t}" if t else "mean", linewidth=1 if t else 3)
    angle.axhline(-0.05, color="grey", linestyle=":")
    angle.set(xlabel="step", title="never: cosine of alignment's and denoising gradient")
    angle.legend()
    write_file(home / "compare.png", lambda f: figure.savefig(f, format="png", dpi=80))
    print(f"{home}/compare.png, samples.png, compare.json")


# ---- 9. The command line -----------------------------------------------------------------------------------

DRAWING = {"num_samples", "mode", "num_steps", "cfg_scale", "guidance_low", "guidance_high", "balanced",
           "seed", "precision", "compile", "model", "vae", "save_npz", "save_every", "captions_from"}
MEASURING = {"ref", "json", "no_prec_recall"}
FOREIGN = {"ckpt": {"out"}, "samples": DRAWING | {"out"}, "make_ref": DRAWING | MEASURING}


def parse(argv):
    """The flags; those of drawing samples are in the dialect of SiT and REPA. Raises BadInput."""
    parser = haste.Parser(prog="evaluate.py", allow_abbrev=False,
                          description="FID, sFID, Inception Score, precision and recall, as ADM's evaluator")
    count, weight, share = number(int, 1), number(float, 0), number(float, 0, 1)

    group = parser.add_argument_group("what to evaluate").add_mutually_exclusive_group(required=True)
    flag = group.add_argument
    flag("--ckpt", help="samples to be drawn from a checkpoint's EMA")
    flag("--samples", help="an .npz with arr_0, a folder of images, or a prepared dataset")
    flag("--make-ref", metavar="IMAGES", help="write a reference of images to --out")

    flag = parser.add_argument_group("against what, and where to").add_argument
    flag("--ref", help="an ADM .npz, statistics, a folder of images, or a prepared dataset")
    flag("--json", metavar="FILE", help="the results; --ckpt's are in eval/ in the run's folder, too")
    flag("--no-prec-recall", action="store_true", help="leave precision and recall out")
    flag("--out", default="ref.npz", help="of --make-ref [%(default)s]")

    flag = parser.add_argument_group("how").add_argument
    flag("--inception", metavar="FILE", help="the FID Inception's weights, or `random` [downloaded]")
    flag("--batch-size", type=count, help="of each process [64 on CUDA, 32 elsewhere]")
    flag("--num-workers", type=number(int, 0), default=min(4, os.cpu_count()), help="a process [%(default)s]")
    flag("--device", choices=("cuda", "mps", "cpu"), help="[the best there is]")
    flag("--timeout", type=count, default=1800, help="seconds to wait for a lost process [%(default)s]")

    flag = parser.add_argument_group("how --ckpt's samples are drawn [the paper's protocol]").add_argument
    flag("--num-samples", "--num-fid-samples", type=number(int, 2), default=50_000, help="[%(default)s]")
    flag("--mode", choices=haste.MODES, default="sde", help="ddpm: DiT's own [%(default)s]")
    flag("--num-steps", type=number(int, 2), default=250, help="[%(default)s]")
    flag("--cfg-scale", type=weight, default=1.0, help="1: no guidance [%(default)s]")
    flag("--guidance-low", type=share, default=0.0, help="guide where t is in [low, high] [%(default)s]")
    flag("--guidance-high", type=share, default=1.0, help="[%(default)s]")
    flag("--captions-from", metavar="DIR", help="the captioned dataset that an MM-DiT draws")
    flag("--balanced", action="store_true", help="as many of each class, where labels are drawn at random")
    flag("--seed", type=number(int, 0), default=0, help="[%(default)s]")
    flag("--precision", choices=("bf16", "fp16", "fp32"), help="of the model [bf16 on CUDA, fp32 elsewhere]")
    flag("--compile", action="store_true", help="torch.compile the model")
    flag("--model", default="SiT-XL/2", help="for a checkpoint that does not say [%(default)s]")
    flag("--vae", metavar="NAME_OR_PATH", help=f"that decodes [{haste.VAE_DECODER}]")
    flag("--save-npz", metavar="FILE", help="keep the samples, as arr_0 of an .npz")
    flag("--save-every", type=weight, default=60, help="seconds between savings of progress [%(default)s]")

    args = parser.parse_args(argv)
    task = next(name for name in FOREIGN if getattr(args, name) is not None)
    for name in sorted(FOREIGN[task]):
        if getattr(args, name) != parser.get_default(name):
            raise BadInput(f"--{name} says nothing about --{task}: leave it out".replace("_", "-"))
    if task != "make_ref" and not args.ref:
        raise BadInput("--ref is missing: the README says where references are, and --make-ref makes one")
    if args.guidance_low > args.guidance_high:
        raise BadInput("--guidance-low lies above --guidance-high: there would be no guidance")
    if args.model not in haste.NAMES:
        raise BadInput(f"unknown model {args.model!r}: choose one of {', '.join(haste.NAMES)}")
    return args


def main(argv=None):
    with haste.mistakes_told("evaluate.py"):
        results = evaluate(parse(argv))
        if dist.is_initialized():
            dist.destroy_process_group()
        return results


if __name__ == "__main__":
    main()
