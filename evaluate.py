# SPDX-License-Identifier: MIT
"""FID, sFID, Inception Score, precision and recall as ADM's TensorFlow evaluator computes them, in PyTorch.

    torchrun --nproc_per_node=8 evaluate.py --ckpt runs/NAME/checkpoints/0400000.pt --ref REF
    python evaluate.py --samples SAMPLES --ref REF          # an .npz, or a folder of images
    python evaluate.py --make-ref IMAGES --out ref.npz      # a reference of your own images

    FID, sFID   |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of the pooled and the spatial features
    IS          exp(mean of sum p (log p - log mean p)), the mean over splits of 5,000 samples
    precision   fraction of samples within the k-NN radius of a reference image, k = 3
    recall      fraction of reference images within the k-NN radius of a sample

REF is VIRTUAL_imagenet256_labeled.npz of openai/guided-diffusion, as in DiT, SiT, REPA and HASTE. --ckpt
draws PNGs into a folder, only those that are missing, and measures it. Run the same command again to resume.

What moves a FID: the sampler, its steps and its guidance. Fewer samples raise it: a CIFAR-10 model had 5.12
with 50,000 and 9.75 with 5,000 (github.com/atong01/conditional-flow-matching/issues/111). --balanced lowers
it by about 0.1. JPEG files move it. A resize with half-pixel centres moved one FID from 3.943 to 3.941, and
TF32 in the Inception another from 46.830 to 46.788.
ADM computes precision and recall in fp16, which adds about 0.001 and 0.0025. Samples are drawn in fp32, with
TF32 on a GPU, as the released code draws them; --precision bf16 is another protocol.

Sections 1 to 5 are the evaluation. Sections 6 and 7 are --demo and --demo --compare of haste.py, which run
ordinary commands of both programs.
"""
import itertools
import json
import math
import os
import shlex
import shutil
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
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
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import normalize
from torchvision.utils import save_image
from tqdm import tqdm

import haste
from haste import DEVICE, RANK, WORLD_SIZE, UserError, atomic_write, print0, user_error

# Features of the Inception for FID, for sFID, and for the Inception Score.
POOL_DIM = 2048
SPATIAL_DIM = 2023
LOGITS_DIM = 1008
# Samples in a split of the Inception Score.
SPLIT_SIZE = 5000
# k of precision and recall.
NEIGHBOURS = 3
# How many images --make-ref stores for precision and recall.
MAX_REFERENCES = 10_000
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
    return x / counted


class Inception(nn.Module):
    """images (B, 3, H, W) uint8 -> pool (B, 2048), spatial (B, 2023), logits (B, 1008) without bias, in fp32.

    weights: a file with the converted weights, "random", or None to download them. Raises UserError.
    """

    def __init__(self, weights=None):
        super().__init__()
        # On the meta device, no time is lost on weights that are overwritten.
        with torch.device("meta"):
            net = timm.create_model(
                "inception_v3", pretrained=False, num_classes=LOGITS_DIM, aux_logits=False)
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
    with user_error(f"the FID Inception's weights could not be loaded from {path or WEIGHTS_URL}; without "
                    f"internet, get that file and use --inception FILE, or --inception random for tests"):
        if path:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True)
        net.load_state_dict(state, assign=True)
        haste.check_finite(state, path or WEIGHTS)


def randomise(net):
    """Weights of a fixed seed that keep activations alive: He's; one pass over noise sets batch norm."""
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(2015)
        for module in net.to_empty(device="cpu").modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
                module.momentum = 1.0
        nn.init.zeros_(net.fc.bias)
        noise = torch.rand(4, 3, 38, 38) * 2 - 1
        net.train()(F.interpolate(noise, 299, mode="bilinear"))


# ---- 2. The metrics ----------------------------------------------------------------------------------------

def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64, device=DEVICE)


class FeatureStatistics:
    """Mean and covariance of features (B, d) that come in batches, from sums in fp64."""

    def __init__(self, d):
        self.n = zeros()
        self.cum_mu = zeros(d)
        self.cum_sigma = zeros(d, d)

    def add(self, x):
        x = x.double()
        self.n += len(x)
        self.cum_mu += x.sum(0)
        self.cum_sigma.addmm_(x.T, x)

    def sums(self):
        return [self.n, self.cum_mu, self.cum_sigma]

    def statistics(self):
        """mu (d,) and sigma (d, d), as np.cov with ddof 1."""
        mu = self.cum_mu / self.n
        sigma = (self.cum_sigma - self.n * torch.outer(mu, mu)) / (self.n - 1)
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


class InceptionScore:
    """exp(mean of sum p (log p - log mean p)) over each split of 5,000 of n samples, and then their mean."""

    def __init__(self, n):
        splits = math.ceil(n / SPLIT_SIZE)
        self.n = zeros(splits)
        self.sum_p = zeros(splits, LOGITS_DIM)
        self.sum_p_log_p = zeros(splits)

    def add(self, rows, logits):
        """logits (B, 1008) of the samples with these numbers."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        split = torch.tensor(rows, device=DEVICE) // SPLIT_SIZE
        self.n.index_add_(0, split, torch.ones_like(p[:, 0]))
        self.sum_p.index_add_(0, split, p)
        self.sum_p_log_p.index_add_(0, split, (p * log_p).sum(1))

    def sums(self):
        return [self.n, self.sum_p, self.sum_p_log_p]

    def score(self):
        mean_p = self.sum_p / self.n[:, None]
        mean_p_log_p = self.sum_p_log_p / self.n
        return (mean_p_log_p - torch.xlogy(mean_p, mean_p).sum(1)).exp().mean().item()


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

class Npz(Dataset):
    """arr_0 of an .npz, (n, H, W, 3) uint8. images[rows], (B, 3, H, W), is read when it is needed."""

    names = ()

    def __init__(self, path):
        self.path = path
        self.file = None
        with user_error(f"{path} is no folder and no .npz with arr_0, uint8 (n, H, W, 3)"):
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                np.lib.format.read_magic(file)
                self.shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
                self.start = file.tell()
            if dtype != np.uint8 or self.shape[3:] != (3,) or fortran_order:
                raise ValueError(f"arr_0 is {dtype} {self.shape}, in Fortran's order: {fortran_order}")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        shape = (len(rows), *self.shape[1:])
        with user_error(f"{self.path}: arr_0 is damaged near image {rows[0]}"):
            # Each loader process opens the file for itself.
            if not self.file:
                self.file = zipfile.ZipFile(self.path).open("arr_0.npy")
            self.file.seek(self.start + rows[0] * math.prod(shape[1:]))
            data = bytearray(self.file.read(math.prod(shape)))
            images = torch.frombuffer(data, dtype=torch.uint8).view(shape)
        return images.permute(0, 3, 1, 2)


class Folder(Dataset):
    """The images below a folder, all of one size. images[rows] is uint8 (B, 3, H, W)."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.names, others = haste.list_images(folder)
        if not self.names:
            raise UserError(f"{folder} holds no images")
        if others:
            print0(f"{folder}: skipping {len(others)} files that are no images: {', '.join(others[:3])}")
        self.shape = None
        _, H, W = self.read(self.names[0]).shape
        self.shape = (len(self.names), H, W, 3)
        # The sizes in the files' headers tell of a misfit before the hours of measuring. EXIF can turn them.
        for name in self.names:
            path = self.folder / name
            with user_error(f"{path} cannot be read"), Image.open(path) as image:
                if sorted(image.size) != sorted((H, W)):
                    self.check_size(name, image.height, image.width)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, rows):
        return torch.stack([self.read(self.names[i]) for i in rows])

    def read(self, name):
        path = self.folder / name
        with user_error(f"{path} cannot be read"), Image.open(path) as image:
            image = haste.to_tensor(haste.to_rgb(image))
        if self.shape:
            self.check_size(name, *image.shape[1:])
        return image

    def check_size(self, name, height, width):
        if (height, width) != self.shape[1:3]:
            raise UserError(f"{self.folder / name} has the size {[height, width]}, and {self.names[0]} "
                            f"{list(self.shape[1:3])}: all must have one size, as those of --prepare have")


def split_rows(n, batch_size):
    """range(n) in parts of batch_size, the last of which may be smaller."""
    return [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]


def open_images(path, statistics_suffice=False):
    """(images, their statistics or None) of a folder, or of an .npz with ADM's keys. Raises UserError.

    The statistics are {"fid": (mu, sigma), "sfid": (mu, sigma)}. With statistics_suffice, images may be None.
    """
    if Path(path).is_dir():
        return check_number(path, Folder(path)), None
    statistics = None
    with user_error(f"{path} is no folder and no intact .npz"), np.load(path) as file:
        if "mu" in file.files:
            statistics = read_statistics(file)
        has_images = "arr_0" in file.files
    if statistics and statistics_suffice and not has_images:
        return None, statistics
    return check_number(path, Npz(path)), statistics


def check_number(path, images):
    if len(images) <= NEIGHBOURS:
        raise UserError(f"{path} holds {len(images)} images, and at least {NEIGHBOURS + 1} are needed")
    return images


def read_statistics(file):
    """The statistics that an .npz holds. Some references have those of FID alone."""
    statistics = {}
    for metric, suffix, d in (("fid", "", POOL_DIM), ("sfid", "_s", SPATIAL_DIM)):
        if f"mu{suffix}" not in file.files:
            continue
        mu = torch.from_numpy(file[f"mu{suffix}"]).double().to(DEVICE)
        sigma = torch.from_numpy(file[f"sigma{suffix}"]).double().to(DEVICE)
        if mu.shape != (d,) or sigma.shape != (d, d):
            raise ValueError(f"mu{suffix} {list(mu.shape)}, sigma{suffix} {list(sigma.shape)} must be of {d}")
        if not mu.isfinite().all() or not sigma.isfinite().all():
            raise ValueError(f"mu{suffix} or sigma{suffix} is not finite")
        statistics[metric] = mu, sigma
    return statistics


def checksum(state):
    """A number that differs if any weight of a state dict does."""
    crc = 0
    for x in state.values():
        crc = zlib.crc32(x.cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


class Sampler:
    """Draws a checkpoint's samples, as PNGs in a folder. Raises UserError.

    Batch i is a function of (seed, i), whatever the number of processes. `protocol` is all that decides the
    samples; FOLDER.json holds it.
    """

    def __init__(self, args):
        self.args = args
        with haste.first_process_first():
            self.model, run_args = haste.load_ema(args.ckpt, args.model)
            self.vae = haste.load_decoder(run_args["vae"], args.vae, self.model)
        self.scale = run_args["scale"]
        self.interval = (args.guidance_low, args.guidance_high)
        haste.check_sampler(self.model, args.num_steps, args.cfg_scale, self.interval, args.mode)
        self.trained_labels = run_args.get("trained_labels") or list(range(self.model.num_classes))
        self.labels = self.choose_labels(args.num_samples, np.random.default_rng(args.seed))
        self.protocol = {
            "model": run_args["model"], "EMA's checksum": checksum(self.model.state_dict()),
            "seed": args.seed, "number of samples": args.num_samples, "batch size": args.batch_size,
            "sampler": args.mode, "steps": args.num_steps, "arithmetic": args.precision,
            "guidance": args.cfg_scale, "interval": list(self.interval),
            "guided channels": self.model.guided_channels, "labels": self.describe_labels(),
            "labels' checksum": zlib.crc32("\n".join(map(str, self.labels)).encode()),
            "VAE": "none: pixels", "scale": self.scale}
        if self.vae:
            self.protocol["VAE"] = self.vae.config["_name_or_path"]
            self.protocol["VAE's checksum"] = checksum(self.vae.state_dict())
        if args.compile:
            haste.compile_blocks(self.model)
        self.folder = Path(args.out or self.default_folder())
        self.record = Path(f"{self.folder}.json")

    def default_folder(self):
        args = self.args
        path = Path(args.ckpt).absolute()
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        balanced = "-balanced" if args.balanced else ""
        name = (f"{path.stem}-{args.mode}-{args.num_steps}-cfg-{args.cfg_scale:g}-in-{args.guidance_low:g}-"
                f"{args.guidance_high:g}-seed-{args.seed}-{args.num_samples}{balanced}")
        return run / "eval" / name

    def choose_labels(self, n, rng):
        """For each of n samples its class, or its caption. Only classes that occur in training are drawn."""
        source = self.args.captions_from
        if isinstance(self.model, haste.MMDiT) != bool(source):
            raise UserError("--captions-from DIR is for an MMDiT, which draws the captions of that dataset")
        if source and self.args.balanced:
            raise UserError("--balanced is for classes, and an MMDiT has none: leave it out")
        if source:
            data = haste.Data(source)
            with user_error(f"--captions-from {source} has images without captions"):
                texts = [data.captions[name][0] for name in data.names]
            return np.resize(rng.permutation(texts), n)
        classes = np.array(self.trained_labels)
        # In random order: samples sorted by class would spoil the splits of IS.
        if self.args.balanced:
            return classes[rng.permutation(np.arange(n) % len(classes))]
        return classes[rng.integers(len(classes), size=n)]

    def describe_labels(self):
        if self.args.captions_from:
            return self.args.captions_from
        order = "balanced" if self.args.balanced else "uniform at random"
        if len(self.trained_labels) < self.model.num_classes:
            order += f", of the {len(self.trained_labels)} classes that occur in training"
        return order

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

    def generate_missing(self):
        """Draws the batches that lack a file, and returns the folder."""
        names = [f"{i:06d}.png" for i in range(self.args.num_samples)]
        # What another process or another command has drawn is there already.
        present = set(haste.list_images(self.folder)[0])
        if present and not self.record.is_file():
            raise UserError(f"{self.folder} holds images that this program did not draw: name another --out")
        if present:
            recorded = haste.read_json(self.record)
            different = [key for key, value in self.protocol.items() if recorded.get(key) != value]
            different += sorted(present.difference(names))[:3]
            # A folder with samples of two kinds would have a figure of neither.
            if different:
                raise UserError(f"{self.folder} has samples that were drawn in another way "
                                f"({', '.join(different)}): delete it, or name another --out")
        missing = [rows for rows in split_rows(len(names), self.args.batch_size)
                   if not present.issuperset(names[rows.start:rows.stop])]
        # All processes have looked before one writes.
        haste.barrier()
        lock = None
        if RANK == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = haste.lock_folder(self.folder)
            write_json(self.record, self.protocol)
        # Pillow encodes on several cores at a time.
        with ThreadPoolExecutor(4) as pool, \
                tqdm(missing[RANK::WORLD_SIZE], "drawing", unit=" batches", disable=RANK > 0) as bar:
            for rows in bar:
                arrays = self.sample(rows).permute(0, 2, 3, 1).cpu().numpy()
                paths = [self.folder / names[i] for i in rows]
                list(pool.map(write_png, paths, arrays))
        haste.barrier()
        if lock:
            lock.close()
        return self.folder


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


def measure(images, net, args, title, keep_features):
    """({"fid": (mu, sigma), "sfid": (mu, sigma)}, IS, the pooled features (n, 2048) or none) of images.

    Each process takes every WORLD_SIZE-th batch.
    """
    allow_tf32(False)
    n = len(images)
    ranges = split_rows(n, args.batch_size)[RANK::WORLD_SIZE]
    pool_statistics = FeatureStatistics(POOL_DIM)
    spatial_statistics = FeatureStatistics(SPATIAL_DIM)
    inception_score = InceptionScore(n)
    features = torch.zeros(n if keep_features else 0, POOL_DIM, device=DEVICE)
    # The loader's processes read a whole batch at a time, images[rows].
    loader = DataLoader(images, batch_size=None, sampler=ranges, num_workers=args.num_workers,
                        timeout=300 if args.num_workers else 0)
    # On a CPU, large tensors would get new memory for each batch, which takes a tenth of the time.
    part_size = 16 if DEVICE.type == "cpu" else args.batch_size
    with tqdm(total=len(ranges), desc=title, unit=" batches", disable=RANK > 0) as bar:
        for rows, batch in zip(ranges, haste.load_batches(loader)):
            outputs = [net(part) for part in batch.to(DEVICE).split(part_size)]
            pool, spatial, logits = [torch.cat(parts) for parts in zip(*outputs)]
            pool_statistics.add(pool)
            spatial_statistics.add(spatial)
            inception_score.add(rows, logits)
            if keep_features:
                features[rows.start:rows.stop] = pool
            bar.update()
    # Sums of the processes add up, and each process has filled its own rows of the features.
    if WORLD_SIZE > 1:
        sums = [*pool_statistics.sums(), *spatial_statistics.sums(), *inception_score.sums()]
        for x in (*sums, features):
            dist.all_reduce(x)
    statistics = {"fid": pool_statistics.statistics(), "sfid": spatial_statistics.statistics()}
    return statistics, inception_score.score(), features


def list_notes(args, samples, references, reference_statistics, stored_statistics):
    """Sentences on what makes these figures incomparable with published ones."""
    notes = []
    if not references:
        notes.append(f"{args.ref} holds statistics but no images: precision and recall are left out")
    elif references.shape[1:] != samples.shape[1:]:
        notes.append(f"samples have the size {samples.shape[1:3]}, and reference images "
                     f"{references.shape[1:3]}")
    if "sfid" not in reference_statistics:
        notes.append(f"{args.ref} has no mu_s and sigma_s: sFID is left out; if pytorch-fid or clean-fid "
                     f"wrote this file, FID compares with no other, as they resize images in another way")
    if args.inception == "random":
        notes.append("the features are a random network's: figures compare only with one another")
    if stored_statistics:
        notes.append(f"FID and sFID are those of the mu and sigma in {args.samples}, as ADM takes them")
    elif len(samples) < 50_000:
        notes.append(f"only {len(samples):,} samples instead of 50,000: FID is biased upwards")
    if any(name.lower().endswith((".jpg", ".jpeg")) for name in samples.names):
        notes.append("samples are JPEG files, which moves FID")
    if len(samples) > SPLIT_SIZE and any("/" in name for name in samples.names):
        notes.append(f"samples come folder by folder: if these are classes, IS over splits of {SPLIT_SIZE:,} "
                     f"is too low")
    return notes


def evaluate(args):
    """Measures args.ckpt or args.samples against args.ref, or makes a reference. Prints protocol and metrics.

    Returns {metric: value} on the first process, and None on the others. Raises UserError.
    """
    # --- mistakes in the reference, the samples and the checkpoint are found before the hours of sampling
    haste.join_processes(args)
    if args.json:
        haste.check_output("--json", args.json)
    with haste.first_process_first():
        net = Inception(args.inception).to(DEVICE)
    if args.make_ref:
        return make_reference(args, net)
    references, reference_statistics = open_images(args.ref, statistics_suffice=True)
    sampler = None
    stored_statistics = None
    if args.ckpt:
        sampler = Sampler(args)
    else:
        samples, stored_statistics = open_images(args.samples)
    keep_features = references is not None and not args.no_prec_recall

    # --- features of the reference, then of the samples
    if keep_features or not reference_statistics:
        measured, _, reference_features = measure(references, net, args, "reference", keep_features)
        reference_statistics = reference_statistics or measured
    source = args.samples
    if sampler:
        source = str(sampler.generate_missing())
        samples = Folder(source)
    statistics, inception_score, features = measure(samples, net, args, "samples", keep_features)
    if RANK > 0:
        return None
    # ADM takes the statistics that are stored in a file of samples, if there are any.
    if stored_statistics:
        statistics |= stored_statistics

    # --- the metrics, with their protocol and notes
    results = {}
    for metric in reference_statistics:
        results[metric] = frechet_distance(*statistics[metric], *reference_statistics[metric])
    results["is"] = inception_score
    if keep_features:
        results["precision"] = fraction_within(features, reference_features, knn_radii(reference_features))
        results["recall"] = fraction_within(reference_features, features, knn_radii(features))
    protocol = {
        "samples": source, "number of samples": len(samples), "size": list(samples.shape[1:3]),
        "reference": args.ref, "features": args.inception or WEIGHTS}
    if sampler:
        protocol |= sampler.protocol
    notes = list_notes(args, samples, references, reference_statistics, stored_statistics)
    for name, value in (protocol | results).items():
        print(f"{name:20} {value}")
    for note in notes:
        print(f"note: {note}")

    # --- the report: beside the samples that were drawn, and where --json asks for it
    report = results | {"protocol": protocol, "notes": notes}
    paths = [args.json] if args.json else []
    if sampler:
        paths.append(f"{source}-{Path(args.ref).stem}.json")
    for path in paths:
        write_json(path, report)
        print(f"{path} has these figures")
    return results


def make_reference(args, net):
    """--make-ref: ADM's keys, from images; arr_0 holds all of them, or 10,000 evenly spaced ones."""
    path = args.out or "ref.npz"
    haste.check_output("--out", path)
    if os.path.exists(path):
        raise UserError(f"--make-ref: {path} exists already: delete it, or name another file with --out")
    images, _ = open_images(args.make_ref)
    statistics, _, _ = measure(images, net, args, "reference", keep_features=False)
    if RANK > 0:
        return
    count = min(len(images), MAX_REFERENCES)
    chosen = np.linspace(0, len(images) - 1, count).round().astype(int).tolist()
    arr_0 = np.stack([images[[i]][0].permute(1, 2, 0).numpy() for i in chosen])
    mu, sigma = [x.cpu() for x in statistics["fid"]]
    mu_s, sigma_s = [x.cpu() for x in statistics["sfid"]]
    with atomic_write(path) as f:
        np.savez(f, arr_0=arr_0, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    print0(f"{path}: mu and sigma of {len(images):,} images, and {count:,} of the images themselves, for "
           f"precision and recall")


# ---- 5. The command line -----------------------------------------------------------------------------------

def parse_args(argv=None):
    """The values of evaluate.py's flags."""
    parser = haste.Parser("evaluate.py")
    add = parser.add_argument_group("what to measure, and against what").add_argument
    add("--ckpt", help="draw samples from this checkpoint's EMA, then measure them")
    add("--samples", help="measure an .npz with arr_0, or a folder of images")
    add("--make-ref", metavar="IMAGES", help="write a reference of these images to --out")
    add("--ref", help="an ADM .npz, or a folder of images")
    add("--out", help="for --ckpt a folder (default: in the run's eval/), for --make-ref a file (default: "
                      "ref.npz)")
    add("--json", help="a file for the metrics and their protocol")
    add("--no-prec-recall", action="store_true", help="leave precision and recall out")
    add("--inception", metavar="FILE",
        help="the FID Inception's weights (default: downloaded), or random, for tests")
    add("--batch-size", type=haste.COUNT, default=64,
        help="images at a time, in each process; it is a part of what --ckpt draws")

    add = parser.add_argument_group("what --ckpt draws").add_argument
    add("--num-samples", "--num-fid-samples", type=haste.number(int, NEIGHBOURS + 1), default=50_000,
        help="samples")
    add("--balanced", action="store_true", help="the same number of each class, in random order")
    add("--captions-from", metavar="DIR", help="the prepared dataset with an MMDiT's captions")
    add("--model", help="for a checkpoint that does not name its model")

    haste.add_sampler_flags(parser, cfg_scale=1.0)
    haste.add_common_flags(
        parser, "of the network that draws; fp32, on a GPU with TF32, is the released code's, and bf16 "
                "another protocol", precision="fp32")
    return parser.parse_args(argv)


def main(argv=None):
    with haste.exit_on_user_error("evaluate.py"):
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
    images = Folder(sampler.generate_missing())[range(sampler.args.num_samples)]
    return images, torch.from_numpy(sampler.labels)


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
    code = haste.train(announce(
        "haste.py", f"{data_flags} --exp-name demo {TRAIN_FLAGS} {DEMO_FLAGS} {SAMPLE_FLAGS} "
                    f"{training_flags}"))
    if code:
        return code
    classifier = fit_classifier()
    real, real_labels, _ = draw_letters(500, seed=2)
    print(f"\nthe classifier recognises {accuracy(classifier, real, real_labels):.0%} of real letters")
    np.savez(home / "real.npz", arr_0=real[:50].permute(0, 2, 3, 1))
    rows = []
    for path in sorted((home / "checkpoints").glob("*.pt")):
        evaluation = announce(
            "evaluate.py", f"--ckpt {at}/checkpoints/{path.name} --num-samples 100 {SAMPLE_FLAGS} "
                           f"--num-workers 0 --ref {at}/real.npz --inception random")
        images, labels = sample_letters(Sampler(evaluation))
        correct = accuracy(classifier, images, labels)
        print(f"the classifier recognises {correct:.0%} of the samples at step {int(path.stem)}")
        rows.append(images[:20])
    # evaluation and path are those of the last checkpoint.
    evaluate(evaluation)
    haste.sample_from(announce(
        "haste.py", f"--sample {at}/checkpoints/{path.name} {SAMPLE_FLAGS} --out {at}/samples.png"))
    # All checkpoints draw the same labels; the first row has a real letter of each of them.
    first_row = [real[real_labels == label][0] for label in labels[:20]]
    picture = torch.cat([torch.stack(first_row), *rows]) / 255
    with atomic_write(home / "demo.png") as f:
        save_image(F.interpolate(picture, scale_factor=2), f, "png", nrow=20)
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
    the trigger, which never fires at -1. Each HASTE continues from a checkpoint of "never".
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
    if not find_spec("matplotlib"):
        print("note: the tables will have no picture of the curves: that needs pip install matplotlib")
    exp_name = args.exp_name or "compare"
    home = Path(args.output_dir, exp_name)
    path = home / "compare.json"
    data_flags = prepare_letters(home)
    flags = vars(args) | {"seed": None, "seeds": None}
    results = {"flags": flags, "runs": {}, "cosines": {}}
    if path.is_file():
        results = haste.read_json(path)
    if results["flags"] != flags:
        raise UserError(f"{path} compares with other flags: delete {home}, or name another --exp-name")
    classifier = fit_classifier()
    real, labels, _ = draw_letters(2000, seed=2)
    reference = classifier_statistics(classifier, real[:1000])

    def measure_letters(images, labels):
        """Frechet distance by the classifier's features, and the fraction that it recognises."""
        distance = frechet_distance(*classifier_statistics(classifier, images), *reference)
        return {"Frechet distance": distance, "recognised": accuracy(classifier, images, labels)}

    results["real"] = measure_letters(real[1000:], labels[1000:])
    common = f"{data_flags} {TRAIN_FLAGS} {COMPARE_FLAGS} {training_flags}"
    every = haste.parse_args(shlex.split(common)).checkpointing_steps
    seeds = [str(seed) for seed in range(args.seed, args.seed + args.seeds)]
    for (variant, flags), seed in itertools.product(list_variants(every).items(), seeds):
        runs = results["runs"].setdefault(variant, {})
        if seed in runs:
            continue
        run = f"{exp_name}/seed{seed}/{variant.replace(' ', '-')}"
        checkpoints = Path(args.output_dir, run, "checkpoints")
        measured = {}
        if variant.startswith("HASTE"):
            # Until tau it is the same run as "never", of which it takes the checkpoint and the figures.
            tau = int(variant.split()[1])
            trunk = home / f"seed{seed}/never/checkpoints/{tau:07d}.pt"
            checkpoints.mkdir(parents=True, exist_ok=True)
            shutil.copy(trunk, checkpoints)
            never = results["runs"]["never"][seed]
            measured = {step: figures for step, figures in never.items() if int(step) <= tau}
        training = announce("haste.py", f"{common} {flags} --seed {seed} --exp-name {shlex.quote(run)}")
        code = haste.train(training)
        if code:
            return code
        for step in range(every, training.max_train_steps + 1, every):
            if str(step) in measured:
                continue
            sampler = Sampler(parse_args(
                ["--ckpt", str(checkpoints / f"{step:07d}.pt"), "--seed", seed, *MEASURE_FLAGS.split()]))
            figures = measure_letters(*sample_letters(sampler))
            measured[str(step)] = figures | held_out_losses(sampler.model)
        runs[seed] = measured
        if variant == "never":
            lines = (checkpoints.parent / "metrics.jsonl").read_text().splitlines()
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
                cells.append(f"{x.mean():.4g} ({difference:+.2g} ± {error:.2g})")
            print(f"| {step} |", " | ".join(cells), "|")
    real = ", ".join(f"{metric} {value:.4g}" for metric, value in results["real"].items())
    print(f"\nMeans over the seeds {', '.join(seeds)}; in brackets the mean difference to {haste_early} at the "
          f"same seed, ± its standard error. Frechet distance and recognition are by the classifier; L_diff "
          f"is that of the EMA on held-out letters. Real letters: {real}. {home}/compare.json has all.")
    if not find_spec("matplotlib"):
        return

    from matplotlib.figure import Figure
    figure = Figure((11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    x = [int(step) for step in steps]
    for variant in variants:
        axes[0, 0].errorbar(x, *mean_and_error(figures[variant]["Frechet distance"]), label=variant)
    axes[0, 0].set(title="Frechet distance", yscale="log")
    for variant in variants[:3]:
        gap = figures["never"]["Frechet distance"] - figures[variant]["Frechet distance"]
        axes[0, 1].errorbar(x, *mean_and_error(gap), label=variant)
    axes[0, 1].set(title='Frechet distance: what "never" lacks')
    for metric in INTERVALS:
        gap = figures["never"][metric] - figures[haste_early][metric]
        axes[1, 0].errorbar(x, *mean_and_error(gap), label=metric)
    axes[1, 0].set(title=f'held-out L_diff: "never" minus {haste_early}')
    measured = list(results["cosines"][seeds[0]])
    cosines = np.array([[results["cosines"][seed][step] for step in measured] for seed in seeds])
    for k, t in enumerate(haste.TRIGGER_TIMES):
        axes[1, 1].errorbar([int(step) for step in measured], *mean_and_error(cosines[:, :, k]), label=f"t = {t}")
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
