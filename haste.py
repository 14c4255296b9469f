# SPDX-License-Identifier: MIT
"""HASTE in one file: train diffusion transformers fast, aligned with DINOv2 only while they are young.

    REPA Works Until It Doesn't: Early-Stopped, Holistic Alignment Supercharges Diffusion Training
    Wang et al., NeurIPS 2025, https://arxiv.org/abs/2505.16792

    L = L_diff + lambda_R L_REPA + lambda_A L_ATTA    while step < tau     (phase I, holistic alignment)
    L = L_diff                                        while step >= tau    (phase II, no alignment)

    python haste.py --demo                                                # a laptop: no GPU, no download
    python haste.py --model SiT-B/2 --gradient-accumulation-steps 4       # one GPU
    torchrun --nproc_per_node=8 haste.py --model SiT-XL/2 --tau 250000    # eight GPUs: the paper's run

The same command starts a run and resumes it. Sections 1 to 5 are the paper, in its order. Section 8 is the
training loop. Section 10 holds the paper's two other models, DiT and MM-DiT; a reader of SiT can skip it.

    paper     here       shape                  what it is
    x_0       x0         (B, C, S, S)           a clean sample: a VAE latent, or pixels in [-1, 1]
    t         t          (B,)                   time in [0, 1]: 0 is data, 1 is noise
    x_t       x_t        (B, C, S, S)           (1 - t) x0 + t eps
    v         v          (B, C, S, S)           the velocity; its target is eps - x0
    proj(h)   z          (B, N, D_T)            the student's N tokens after its feature block, projected
    y         features   (B, N, D_T)            the teacher's last patch tokens, after its final norm
    A^S, A^T  qk         (B, heads, N, d) each  queries and keys [(q, k), ...] that make the attention maps
              y          (B,)                   the condition: class labels
"""
import argparse
import copy
import gc
import json
import math
import os
import re
import shutil
import signal
import sys
import zipfile
import zlib
from collections import namedtuple
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, partial
from itertools import filterfalse, pairwise
from pathlib import Path, PosixPath

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GELUTanh, Mlp, PatchEmbed, build_sincos2d_pos_embed, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import save_image
from tqdm import tqdm

# torchrun sets which of how many processes this is. CUDA_VISIBLE_DEVICES= chooses the CPU.
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device(f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu")


class UserError(Exception):
    """A user error or a fault of the machine, printed as one sentence."""


@contextmanager
def explained(sentence):
    """Turns whatever other code raises, from a damaged file to a missing package, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        # what follows the traceback of a loader process, or torch.load's advice on weights_only
        reason = " ".join(re.split(r"[Ee]rror: |source\.\n\n", str(e))[-1].split())
        raise UserError(f"{sentence} ({type(e).__name__}: {reason[:300]})") from e


# ---- 1. The student: SiT -----------------------------------------------------------------------------------

# attention_blocks and teacher_blocks (of a ViT of 12 blocks) count from 0, feature_block counts from 1.
Config = namedtuple(
    "Config", "depth hidden_size num_heads attention_blocks feature_block projector_dim teacher_blocks tau")
BASE, LARGE = ((2, 3, 4), 5, 2048, (7, 9, 11)), ((4, 5, 6, 7), 8, 2048, (8, 9, 10, 11))
CONFIGS = {
    "XS": Config(6, 128, 4, (1, 2, 3), 4, 256, (9, 10, 11), 450),       # not in the paper: the demo's
    "S": Config(12, 384, 6, *BASE, 100_000),                            # not in the paper: as B
    "B": Config(12, 768, 12, *BASE, 100_000),
    "L": Config(24, 1024, 16, *LARGE, 250_000),
    "XL": Config(28, 1152, 16, *LARGE, 250_000),                        # tau is 300K at 512 px
    "MMDiT": Config(24, 768, 24, *LARGE, 200_000),                      # section 10
}
LayerNorm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)


def split_heads(qkv, heads):
    """(B, N, 3 D) -> q, k, v, each (B, heads, N, head_dim), as views."""
    return [x.transpose(1, 2) for x in qkv.unflatten(2, (3, heads, -1)).unbind(2)]


class Attention(nn.Module):
    """Self-attention that also returns its queries and keys."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)         # (B, heads, N, head_dim)
        return self.proj(x.transpose(1, 2).flatten(2)), (q, k)


def modulate(x, shift, scale):
    """x (B, N, D) by shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (the DiT paper, section 3.2)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        """Tokens x (B, N, D) and condition c (B, D) -> the next tokens, and (q, k) of the attention."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        attended, qk = self.attn(modulate(self.norm1(x), shift_a, scale_a))
        x = x + gate_a[:, None] * attended
        x = x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        return x, qk


class FinalLayer(nn.Module):
    def __init__(self, dim, out_features):
        super().__init__()
        self.norm_final = LayerNorm(dim)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def frequencies(device=None):
    """The 128 frequencies of the timestep embedding, from 1 down to nearly 1/10,000."""
    return torch.exp(-math.log(10000) / 128 * torch.arange(128, device=device))


class TimestepEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        angle = t.float()[:, None] * frequencies(t.device)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


def sincos_positions(dim, side):
    """Fixed positions (1, side^2, dim): sines and cosines of the column, then of the row."""
    waves = build_sincos2d_pos_embed((side, side), dim)         # sin row, sin column, cos row, cos column
    return waves.view(1, side ** 2, 2, 2, -1).transpose(2, 3).flip(2).flatten(2)

def unpatchify(x, patch):
    """Tokens (B, N, patch^2 C) -> (B, C, S, S)."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(2, (patch ** 2, -1)).permute(0, 3, 2, 1)            # (B, C, patch^2, N)
    return F.pixel_shuffle(x.flatten(1, 2).unflatten(2, (side, side)), patch)

def xavier(module):
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """The scalable interpolant transformer with REPA's projector; parameter names as in SiT and REPA.
    attention_blocks count from 0, feature_block from 1. Label dropout is part of the training loop."""

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 num_classes=1000, attention_blocks=(4, 5, 6, 7), feature_block=8,
                 teacher_dim=768, projector_dim=2048, out_channels=None):
        super().__init__()
        self.process = Flow                                                                     # section 3
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.attention_blocks, self.feature_block = attention_blocks, feature_block
        self.num_classes = self.null_label = num_classes        # the last row of y_embedder, for guidance
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = nn.Sequential()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        positions = sincos_positions(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        with torch.random.fork_rng(devices=()):     # all else starts the same whatever the teacher's width
            self.projectors = nn.ModuleList([nn.Sequential(
                nn.Linear(hidden_size, projector_dim), nn.SiLU(),
                nn.Linear(projector_dim, projector_dim), nn.SiLU(), nn.Linear(projector_dim, teacher_dim))])
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * (out_channels or in_channels))
        self.initialize_weights()

    def initialize_weights(self):
        for part in (self.x_embedder, self.t_embedder, self.blocks, self.final_layer):
            part.apply(xavier)
        for m in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(m.weight, std=0.02)
        for m in [*self.blocks, self.final_layer]:      # adaLN-Zero: each block starts as the identity
            nn.init.zeros_(m.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)  # and the model as v = 0
        self.projectors.apply(xavier)

    def forward(self, x, t, y, align=False):
        """x (B, C, S, S), t (B,), y (B,) -> v (B, C, S, S).
        With align: v, z (B, N, teacher_dim), [(q, k), ...] of attention_blocks, (B, heads, N, head_dim)."""
        x = self.x_embedder(x) + self.pos_embed         # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)     # (B, D)
        maps = {}
        for i, block in enumerate(self.blocks):
            x, qk = block(x, c)
            if align and i in self.attention_blocks:
                maps[i] = qk                            # views: keeping them costs nothing
            if align and i + 1 == self.feature_block:
                z = self.projectors[0](x)
        v = unpatchify(self.final_layer(x, c), self.patch_size)
        return (v, z, [maps[i] for i in self.attention_blocks]) if align else v


# ---- 2. The teacher: DINOv2, frozen ------------------------------------------------------------------------

DINOV2_REPO = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"


class Teacher(nn.Module):
    """A frozen ViT that returns its patch tokens and the queries and keys of some blocks.
    vit: DINOv2 from torch.hub, or a timm VisionTransformer; blocks count from 0; grid: the student's tokens
    on a side, to which images and positions are resampled."""

    def __init__(self, vit, blocks, grid):
        super().__init__()
        self.blocks, self.grid, self.dim = blocks, grid, vit.embed_dim
        self.size = grid * vit.patch_embed.patch_size[0]
        vit.pos_embed.data = resample_abs_pos_embed(vit.pos_embed.data, [grid, grid])       # once for all
        vit.patch_embed.grid_size = grid, grid      # so that timm does not do it again
        self.vit = vit.eval().requires_grad_(False)
        moments = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])
        self.register_buffer("moments", 255 * moments.view(2, 3, 1, 1), persistent=False)
        self.qkv = {}
        for b in blocks:
            hook = lambda module, args, out, b=b: self.qkv.update({b: out})
            vit.blocks.get_submodule(str(b)).attn.qkv.register_forward_hook(hook)   # -1 is an error

    @torch.no_grad()
    def forward(self, images):
        """images (B, 3, H, W) uint8 -> features (B, N, dim), [(q, k), ...] as the student's."""
        mean, std = self.moments
        x = F.interpolate((images - mean) / std, self.size, mode="bicubic")
        N = self.grid ** 2      # the last N tokens are patches; class and register tokens come before them
        features = self.vit.forward_features(x)
        features = features["x_norm_patchtokens"] if isinstance(features, dict) else features[:, -N:]
        heads = self.vit.blocks[0].attn.num_heads
        return features, [split_heads(self.qkv.pop(b)[:, -N:], heads)[:2] for b in self.blocks]


def load_teacher(name, grid, blocks):
    """The Teacher called `name`: a DINOv2 of torch.hub, or a file with the arguments ("config") and weights
    ("model") of a timm VisionTransformer. blocks are those of a ViT of 12 blocks; in another they keep their
    distance from the last. Raises UserError."""
    with explained(f"--teacher {name} could not be loaded; choose dinov2_vit[s,b,l,g]14[_reg], or a file; "
                   f"without internet, copy {torch.hub.get_dir()} from a machine that has loaded it"):
        if name.startswith("dinov2_"):
            vit = torch.hub.load(DINOV2_REPO, name, trust_repo=True, skip_validation=True)
        else:
            saved = torch.load(name, map_location="cpu", weights_only=True)
            vit = VisionTransformer(**saved["config"], dynamic_img_size=True)
            vit.load_state_dict(saved["model"])
        blocks = [b - 12 + len(vit.blocks) for b in blocks]
        return Teacher(vit, blocks, grid)


# ---- 3. Diffusion: the flow that SiT learns, and its samplers ----------------------------------------------

class Flow:
    """The linear interpolant from data to noise, and its velocity; a namespace of functions."""
    modes, guided_channels = ("sde", "ode", "heun"), None

    # x_t = (1 - t) x0 + t eps
    def add_noise(x0, eps, t):
        """x0, eps (B, C, S, S), t (B,) -> x_t, and the time that the model is given."""
        s = t.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * eps, t

    # L_diff = mean (v(x_t, t) - (eps - x0))^2
    def loss(v, x0, eps, x_t, t):
        return ((v - (eps - x0)) ** 2).mean()

    # dx = v dt,  or with w = 2t:  dx = (v - w s / 2) dt + sqrt(w) dW,  score s = -(x + (1 - t) v) / t
    def sample(velocity, x, steps, mode):
        """Integrates velocity(x, t, t_guide) from x (B, C, S, S) at t = 1 to t = 0."""
        times = [*np.linspace(1, 0.04, steps), 0] if mode == "sde" else np.linspace(1, 0, steps + 1)
        for t, t_next in tqdm(list(pairwise(times)), desc="sampling", disable=RANK > 0, leave=False):
            v, dt = velocity(x, t, t), t_next - t
            if mode == "sde":
                w, score = 2 * t, -(x + (1 - t) * v) / t
                x = x + (v - 0.5 * w * score) * dt
                if t_next > 0:      # the last step takes the mean
                    x = x + math.sqrt(w * -dt) * torch.randn_like(x)
            elif mode == "heun" and t_next > 0:
                x = x + 0.5 * (v + velocity(x + v * dt, t_next, t)) * dt
            else:
                x = x + v * dt
        return x


@torch.no_grad()
def sample(model, noise, y, steps=250, cfg_scale=1.0, guidance=(0.0, 1.0), mode="sde"):
    """noise (B, C, S, S) and conditions y (B,) -> samples (B, C, S, S), in fp64.
    "sde" is the paper's: Euler-Maruyama with `steps` evaluations, t from 1 to 0.04, and then the mean at 0.
    "ode" is Euler; "heun" takes 2 steps - 1 evaluations. Guidance acts where t is in [*guidance].
    Raises UserError for a mode that the model does not have."""
    if mode not in model.process.modes:
        raise UserError(f"this model has no sampler {mode}: use --mode {' or '.join(model.process.modes)}")
    c = model.process.guided_channels       # None is all
    if cfg_scale != 1:
        with explained("a model trained without label dropout cannot be guided: use --cfg-scale 1"):
            null = torch.as_tensor(model.null_label, device=y.device).expand_as(y)

    # v = v_null + cfg_scale (v_y - v_null)
    def guided(x, t, t_guide):
        x, t = x.to(noise.dtype), noise.new_full((len(x),), t)
        if cfg_scale == 1 or not guidance[0] <= t_guide <= guidance[1]:
            return model(x, t, y).double()
        v, v_null = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).double().chunk(2)
        v[:, :c] = v_null[:, :c] + cfg_scale * (v[:, :c] - v_null[:, :c])
        return v

    return model.process.sample(guided, noise.double(), steps, mode)


# ---- 4. Alignment: the two losses --------------------------------------------------------------------------

# L_REPA = - mean over images and tokens of cos(z, features)
def feature_loss(z, features):
    """z, features (B, N, D_T) -> a scalar in [-1, 1]. In fp32: normalising in fp16 gives NaN."""
    return -F.cosine_similarity(z.float(), features.float(), dim=-1).mean()

# L_ATTA = - mean over pairs of blocks, images, heads and rows i of sum_j A^T_ij log A^S_ij
def attention_loss(student_qk, teacher_qk):
    """Two lists of (q, k), (B, heads, N, head_dim) each -> a scalar, in fp32.
    Student head i is paired with teacher head i, for the first 12 heads; the other heads are free."""
    total = 0
    for student, teacher in zip(student_qk, teacher_qk, strict=True):
        heads = min(student[0].shape[1], teacher[0].shape[1], 12)
        with torch.autocast(DEVICE.type, enabled=False):
            total += map_cross_entropy(*(x[:, :heads].float().flatten(0, 1) for x in (*student, *teacher)))
    return total / len(student_qk)


# F.cross_entropy(q k^T / sqrt(d), A^T) for maps A = softmax(q k^T / sqrt(d)). Its gradient by the student's
# logits is A^S - A^T; taking it at once, a few maps at a time, is faster and needs no N x N memory.
def map_cross_entropy(q, k, q_t, k_t):
    """Queries and keys (maps, N, head_dim) of student and teacher -> a scalar."""
    q, q_t = (x * x.shape[2] ** -0.5 for x in (q, q_t))
    dq, dk, total = torch.empty_like(q), torch.empty_like(k), 0
    size = max(1, 2 ** 21 // q.shape[1] ** 2)
    with torch.no_grad():
        for start in range(0, len(q), size):
            i = slice(start, start + size)
            log_a = (q[i] @ k[i].mT).log_softmax(dim=-1)            # (size, N, N)
            a_t = (q_t[i] @ k_t[i].mT).softmax(dim=-1)
            total -= (a_t * log_a).sum()
            d_logits = log_a.exp_().sub_(a_t)
            dq[i], dk[i] = d_logits @ k[i], d_logits.mT @ q[i]
    surrogate = (q * dq).sum() + (k * dk).sum()                     # has the gradients dq and dk
    return (total + surrogate - surrogate.detach()) / q[..., 0].numel()


def losses(net, process, x0, eps, t, y, target, lambda_r, lambda_a):
    """L_diff, L_REPA, L_ATTA, not weighted; a term of weight 0 is left out.
    target: the teacher's (features, qk) for the same images; None in phase II."""
    repa = atta = x0.new_zeros(())
    x_t, t = process.add_noise(x0, eps, t)
    if target is None:
        v = net(x_t, t, y)
    else:
        v, z, qk = net(x_t, t, y, align=True)
        repa = feature_loss(z, target[0]) if lambda_r else repa
        atta = attention_loss(qk, target[1]) if lambda_a else atta
    return process.loss(v.float(), x0, eps, x_t, t), repa, atta


# ---- 5. Termination: the gradient-angle trigger of appendix A.2 --------------------------------------------

TRIGGER_TIMES = (0.02, 0.1, 0.5, 0.8)

# alignment is dropped when cos(grad (lambda_R L_REPA + lambda_A L_ATTA), grad L_diff) is below a threshold
def gradients(model, t, x0, eps, y, target, lambda_r, lambda_a):
    """The two gradients at time t, for the P parameters of the feature block: (2, P)."""
    parameters = list(model.blocks[model.feature_block - 1].parameters())
    diff, repa, atta = losses(
        model, model.process, x0, eps, x0.new_full((len(x0),), t), y, target, lambda_r, lambda_a)
    pair = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            for loss in (lambda_r * repa + lambda_a * atta, diff)]
    return torch.stack([nn.utils.parameters_to_vector(gradient) for gradient in pair])


# ---- 6. Data: images and their latents ---------------------------------------------------------------------

# A dataset has the layout of REPA's preprocessing. --prepare adds "classes", "vae", ... to the JSON.
#   images/00000/img00000000.png              a cropped image
#   vae-sd/00000/img-mean-std-00000000.npy    mean and std of its latent, (2C, S, S) fp32; not for pixels
#   vae-sd/dataset.json                       {"labels": [[name, label], ...]}; for pixels it is in images/
PNG, NPY = "images/{:05d}/img{:08d}.png", "vae-sd/{:05d}/img-mean-std-{:08d}.npy"
VAE_ENCODER, VAE_DECODER, VAE_SCALE = "stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema", 0.18215
HIDDEN = re.compile(r"\.|__MACOSX$")       # names that are no classes and no images


def list_images(folder):
    """Sorted relative paths of the images below a folder, and of its other files, through links, too."""
    images, others, seen = [], [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = filterfalse(HIDDEN.match, folders)
        for name in filterfalse(HIDDEN.match, files):
            found = images if name.lower().endswith(IMG_EXTENSIONS) else others
            found.append(os.path.relpath(f"{root}/{name}", folder))
    return sorted(images), sorted(others)

def upright(image):
    """A PIL image in RGB, turned by its EXIF orientation."""
    with suppress(Exception):        # damaged EXIF data raises anything, and the pixels may be fine
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] == "I":        # 16 bits, which Pillow would clip at 255
        image = image.point(lambda level: level / 256)
    return image.convert("RGB")

def to_tensor(image):
    """A PIL image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def center_crop(image, size):
    """ADM's crop of a PIL image: halve with BOX while possible, then BICUBIC, then cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize([x // 2 for x in image.size], Image.BOX)
    scale = size / min(image.size)
    image = image.resize([round(scale * x) for x in image.size], Image.BICUBIC)
    left, top = ((x - size) // 2 for x in image.size)
    return image.crop((left, top, left + size, top + size))


class Data(Dataset):
    """A prepared dataset: data[i] is {"index", "y", "moments" (2C, S, S), "image" (3, R, R) uint8}.
    The image is there if with_images is set, or if the model learns pixels. Raises UserError."""

    def __init__(self, folder):
        self.images, self.latents = Path(folder, "images"), Path(folder, "vae-sd")
        self.with_images, self.vae, self.scale, labels = False, VAE_ENCODER, VAE_SCALE, {}
        if not (self.latents / "dataset.json").is_file():
            self.latents = self.vae = None
        listing = (self.latents or self.images) / "dataset.json"
        if not listing.is_file():
            raise UserError(f"no dataset in {folder}: make one with --prepare IMAGES --data-dir {folder}")
        metadata = read_json(listing)
        for entry in metadata.get("labels") or [None]:
            with explained(f"{listing}: the label {entry} is not [name, whole number]"):
                name, label = entry
                labels[name] = int(str(label).removesuffix(".0"))
        self.names, self.labels = map(np.array, zip(*sorted(labels.items())))
        self.classes = metadata.get("classes") or [*range(self.labels.max() + 1)]
        self.captions = metadata.get("captions")
        if self.latents and "vae" in metadata:
            self.vae, self.scale = metadata["vae"], metadata["scale"]
        channels, *size = self[0]["moments" if self.latents else "image"].shape
        self.shape = (channels // 2 if self.latents else channels, *size)       # of a clean sample x0
        if self.vae == VAE_ENCODER and channels != 8:
            raise UserError(f'{listing} does not name a VAE of {channels // 2} channels: add "vae", "scale"')

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        item, name = {"index": i, "y": self.labels[i]}, self.names[i]
        with explained(f"an image or latent of {name} cannot be read"):
            if self.latents:
                item["moments"] = torch.from_numpy(np.load(self.latents / name)).squeeze(0)
            if self.with_images or not self.latents:
                name = name.replace("img-mean-std-", "img").replace(".npy", ".png")
                item["image"] = to_tensor(Image.open(self.images / name))
        return item

    def x0(self, batch, xi):
        """Clean samples (B, C, S, S): pixels in [-1, 1], or scale (mean + std xi) of the latents."""
        if not self.latents:
            return batch["image"] / 127.5 - 1
        mean, std = batch["moments"].chunk(2, dim=1)
        return self.scale * (mean + std * xi)

    def condition(self, batch, u, drop):
        """y of a batch; the null label, for guidance, where u (B,), uniform in [0, 1), is below `drop`."""
        if self.captions:
            return encode_captions(choose_captions(self, batch["index"], u, drop))
        return torch.where(u < drop, len(self.classes), batch["y"])


def to_device(batch):
    return {key: x.to(DEVICE, non_blocking=True) for key, x in batch.items()}

# What is random is a function of (seed, step, place in the global batch). A resumed run, or one on another
# number of processes, sees the same images in the same order, with the same times and noise.

@lru_cache(maxsize=2)
def permutation(n, *key):
    return np.random.default_rng(key).permutation(n)

def batch_indices(n, seed, batch_size, rows, steps):
    """For each step, the indices of these rows of the global batch, from one permutation after another."""
    for step in steps:
        positions = range(step * batch_size + rows.start, step * batch_size + rows.stop)
        yield [permutation(n, seed, p // n)[p % n] for p in positions]

def draw(n, shape, *key):
    """For a global batch of n: t and u (n,), uniform in [0, 1), and eps and xi (n, *shape), normal."""
    g = torch.Generator(DEVICE).manual_seed(int(np.random.default_rng(key).integers(2 ** 63)))
    uniform = torch.rand(2, n, generator=g, device=DEVICE)
    return *uniform, *torch.randn(2, n, *shape, generator=g, device=DEVICE)

def write_crops(source, names, out, size, indices):
    """Writes PNGs of these images; returns {index: uint8 (3, R, R)} of those that can be read."""
    crops = {}
    for i in indices:
        try:
            with Image.open(source / names[i]) as image:
                crop = center_crop(upright(image), size)
        except Exception as e:      # a damaged file can make Pillow raise anything
            print(f"left out: {names[i]} ({type(e).__name__}: {e})", file=sys.stderr)
            continue
        with replacing(out / PNG.format(i // 1000, i)) as f:
            crop.save(f, "PNG", compress_level=1)
        crops[i] = to_tensor(crop)
    return crops

@torch.no_grad()
def prepare(args):
    """--prepare: turns a tree of class folders, or COCO's images and captions, into a dataset at --data-dir.
    Each file gets its name when it is complete, dataset.json comes last, and the same command resumes."""
    join_processes(args)
    source, out = Path(args.prepare), Path(args.data_dir)
    names, others = list_images(source)
    captions = read_coco(args.captions[0], names) if args.captions else None
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    classes, labels = np.unique(tops, return_inverse=True)
    empty = {path.name for path in source.glob("*/") if not HIDDEN.match(path.name)} - {*classes}
    if not names or empty or "" in classes and not captions or {"train", "val"} <= {*classes}:
        raise UserError(f"{source} must hold a folder of images for each class (put a flat folder into one); "
                        f"of its {len(names)} images {tops.count('')} are in none; "
                        f"classes {', '.join(classes[:3])}; empty: {', '.join(empty)}")
    vae = load_vae(args.vae or VAE_ENCODER) if args.vae != "none" else None
    folder, template = ("vae-sd", NPY) if vae else ("images", PNG)      # what is written last for an image
    paths = [out / template.format(i // 1000, i) for i in range(len(names))]
    begun = out / f".prepare-{zlib.crc32(repr((names, args.vae, args.resolution)).encode())}"
    if RANK == 0 and not any(out.glob("*")):
        with replacing(begun):
            pass
    barrier()
    if not begun.is_file():
        raise UserError(f"--data-dir {out} holds other files, or was begun differently: name a new folder")

    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    barrier()       # all processes have looked before one writes
    loader = DataLoader(missing[RANK::WORLD], batch_size=32, num_workers=args.num_workers,
                        collate_fn=partial(write_crops, source, names, out, args.resolution))
    for crops in tqdm(loader, disable=RANK > 0):
        if vae and crops:
            latent = vae.encode(torch.stack([*crops.values()]).to(DEVICE) / 127.5 - 1).latent_dist
            for i, moments in zip(crops, torch.cat([latent.mean, latent.std], dim=1).cpu().numpy()):
                with replacing(paths[i]) as f:
                    np.save(f, moments)
    barrier()
    if RANK == 0:
        home = out / folder
        done = {path.relative_to(home).as_posix(): i for i, path in enumerate(paths) if path.is_file()}
        metadata = {
            "labels": [[name, int(labels[i])] for name, i in done.items()], "classes": classes.tolist(),
            "captions": captions and {name: captions[i] for name, i in done.items()},
            "vae": args.vae or VAE_ENCODER, "scale": vae.config.scaling_factor if vae else 1.0}
        with replacing(home / "dataset.json") as f:
            f.write(json.dumps(metadata).encode())
        print(f"{out}: {len(done):,} images; left out: {len(names) - len(done)} damaged, {len(others)} other "
              f"files {others[:3]}; classes from 0: {', '.join(classes[:12])}")


# ---- 7. Processes, models, files ---------------------------------------------------------------------------

def join_processes(args):
    """Joins torchrun's processes, of which only the first prints, and chooses precisions."""
    cuda = DEVICE.type == "cuda"
    if cuda:
        torch.cuda.set_device(DEVICE)
    if "RANK" in os.environ and not dist.is_initialized():
        with explained("start several processes with torchrun"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    # where bf16 is emulated it is slower than fp32; the frozen teacher needs no more
    bf16 = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu._is_avx512_bf16_supported()
    args.precision = args.precision or ("fp32" if not cuda else "bf16" if bf16 else "fp16")
    args.teacher_precision = "bf16" if bf16 and args.precision == "fp32" else args.precision
    torch.set_float32_matmul_precision("high")      # TF32 for what is multiplied in fp32

def autocast(precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(DEVICE.type, dtype, enabled=dtype is not None)

def any_process(flag=False):
    """True if `flag` is set on any process. The hosts wait for each other here, but not for their GPUs."""
    flags = torch.tensor(int(flag))
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)

barrier = any_process       # without a flag

@contextmanager
def one_after_another():
    """Rank 0 enters first, then the first process of each node, then the others: downloads happen once."""
    for turn in range(3):
        if turn == (RANK > 0) + (LOCAL_RANK > 0):
            yield
        barrier()


STOP_SIGNALS = [n for n in signal.Signals if n.name in "SIGTERM SIGINT SIGHUP SIGUSR1".split()]


class StopSignals:
    """A stop signal sets `caught` while busy, and acts at once at other times, as a second Ctrl-C does."""
    caught, busy = 0, True

    def __init__(self):
        for n in STOP_SIGNALS:
            if signal.getsignal(n) != signal.SIG_IGN:       # nohup ignores SIGHUP
                signal.signal(n, self.note)

    def note(self, number, frame):
        before, self.caught = self.caught, number
        if not self.busy or number == signal.SIGINT == before:
            raise KeyboardInterrupt


def ignore_stop_signals(worker):
    for n in STOP_SIGNALS:      # loader processes live as long as their trainer needs them
        signal.signal(n, signal.SIG_IGN)

def load_batches(loader, stop):
    """The loader's batches, until a signal interrupts the wait for one. Raises UserError."""
    batches = iter(loader)
    try:
        while True:
            stop.busy = WORLD > 1       # several processes agree before they stop
            with explained("loading failed; shared memory may be short: --shm-size 8g, or --num-workers 0"):
                batch = next(batches, None)
            stop.busy = True
            if batch is None:
                return
            yield to_device(batch)
    except KeyboardInterrupt:
        return
    finally:
        stop.busy = True
        if loader.num_workers:
            batches._shutdown_workers()         # they ignore SIGTERM

@contextmanager
def replacing(path):
    """Opens a temporary file that gets the name `path` when it is complete and on disk."""
    part = Path(f"{path}.part")
    os.makedirs(part.parent, exist_ok=True)
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def read_json(path):
    with explained(f"{path} cannot be read"):
        return dict(json.loads(Path(path).read_text("utf-8-sig")))

def parse_name(name):
    """(class, Config, patch size) of a model's name. Raises UserError."""
    with explained(f"unknown model {name}: choose SiT- or DiT-{{XS,S,B,L,XL}}/{{2,4,8}}, or MMDiT"):
        kind, _, rest = name.partition("-")
        size, _, patch = rest.partition("/")
        return {"SiT": SiT, "DiT": DiT, "MMDiT": MMDiT}[kind], CONFIGS[size or kind], int(patch or 2)

def build_model(name, **sizes):
    """The model of that name; sizes are arguments of its class, and go before those of CONFIGS."""
    kind, config, patch = parse_name(name)
    return kind(**dict(zip(Config._fields[:6], config)) | {"patch_size": patch} | sizes)

# Harmless types in the args of other people's checkpoints.
SAFE_TYPES = [argparse.Namespace, PosixPath, np.dtype, np.float64(0).__reduce__()[0]]
SAFE_TYPES += [type(np.dtype(kind)) for kind in "?bhilqBefd"]

def read_checkpoint(path, name):
    """A checkpoint of ours, of HASTE, REPA, SiT or DiT, or a bare state dict, with at least "model", "ema",
    "args" and "steps". Its args go before `name` in saying which model it is. Raises UserError."""
    path = Path(path)
    with explained(f"{path} cannot be read as a checkpoint"), torch.serialization.safe_globals(SAFE_TYPES):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        args = saved.get("args") or {}
        args = {"model": name} | (args if isinstance(args, dict) else vars(args))
        process = {str(args.get(key)).lower() for key in ("path_type", "prediction")}
        if not process <= {"none", "linear", "v", "velocity"}:
            raise ValueError(f"it is of another process than linear paths and velocities: {process}")
        model = saved.get("model") or saved.get("ema") or saved
        for key, state in (("ema", saved.get("ema") or model), ("model", model)):
            # without the prefixes of DDP and torch.compile, and without counters
            saved = saved | {key: {re.sub(r"^module\.|_orig_mod\.", "", name): x for name, x in state.items()
                                   if isinstance(x, torch.Tensor) and x.ndim}}
            if parse_name(args["model"])[0] is SiT:
                convert_sit(saved[key])
    steps = saved.get("steps", int(path.stem) if path.stem.isdecimal() else 0)
    return saved | {"args": args, "steps": steps}

def convert_sit(state):
    """Converts weights of SiT's own convention, in place and exactly.
    SiT has 2C output channels, of which it uses the first C, and its time runs from noise (0) to data (1), so
    that our v(x, t) is -SiT(x, 1 - t). As cos((1 - t) w) = cos w cos(t w) + sin w sin(t w), and likewise the
    sine, the other time is a rotation of the timestep embedding's first layer."""
    patches, last = state["x_embedder.proj.weight"], state["final_layer.linear.bias"]
    if len(last) != 2 * patches[0].numel():
        return
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key] = -state[key].unflatten(0, (-1, 2, patches.shape[1]))[:, 0].flatten(0, 1)
    w = frequencies().double()
    A, B = state["t_embedder.mlp.0.weight"].double().chunk(2, 1)        # of the cosines, of the sines
    turned = A * w.cos() + B * w.sin(), A * w.sin() - B * w.cos()
    state["t_embedder.mlp.0.weight"] = torch.cat(turned, dim=1)

def load_state(model, state, path):
    """Loads weights; a missing projector stays as it is. Raises UserError with the first key that differs."""
    projector = {key: x for key, x in model.state_dict().items() if key.startswith("projectors.")}
    with explained(f"{path} belongs to another model: name the right --model, or another --exp-name"):
        model.load_state_dict(projector | state)

def load_ema(path, name):
    """(EMA model in eval mode, the run's args) of a checkpoint, for sampling. Raises UserError.
    Width, depth and heads are those of the model's name; other sizes are those of the weights."""
    saved = read_checkpoint(path, name)
    args, state = saved["args"], saved["ema"]
    with explained(f"{path} holds no weights of a {args['model']}; name the right --model"):
        _, channels, patch, _ = state["x_embedder.proj.weight"].shape
        side = math.isqrt(state["pos_embed"].shape[1]) * patch
        num_classes = len(state.get("y_embedder.embedding_table.weight", range(1001))) - 1
    model = build_model(
        args["model"], input_size=side, in_channels=channels, num_classes=num_classes,
        teacher_dim=len(state.get("projectors.0.4.bias", range(768))))
    load_state(model, state, path)
    if not args.get("cfg_prob", True):
        model.null_label = None
    if "scale" not in args:     # not ours: latents of Stable Diffusion's VAE, or pixels
        args |= {"vae": VAE_ENCODER if channels != 3 else None, "scale": VAE_SCALE}
    return model.to(DEVICE).eval(), args

def newest_checkpoint(folder):
    """The path of the newest whole checkpoint, None if there is none. Raises UserError if all are damaged."""
    for part in folder.glob("*.part"):      # of a save that was killed
        part.unlink(missing_ok=True)
    paths = sorted(folder.glob("[0-9]*.pt"))
    for path in reversed(paths):
        with suppress(Exception):        # damage can make zipfile raise anything
            if path.open("rb").read(2) == b"\x80\x02" or zipfile.ZipFile(path).testzip() is None:
                return path         # torch's old format has no checksums
        print(f"warning: {path} is damaged and passed over")
    if paths:
        raise UserError(f"{folder} holds no whole checkpoint: to start again, move it away")

@cache
def load_vae(name):
    """diffusers' AutoencoderKL, frozen. Raises UserError where diffusers or weights are missing."""
    with explained(f"--vae {name} could not be loaded; it is a name or a folder, pip install diffusers; none "
                   f"is only for --prepare"):
        from diffusers import AutoencoderKL
        config = AutoencoderKL.load_config(name)
        kind, shifts = config["_class_name"], config.get("shift_factor") or config.get("latents_mean")
        if kind != "AutoencoderKL" or shifts:
            raise ValueError(f"only an AutoencoderKL without shifts will do, not a {kind}")
        vae, info = AutoencoderKL.from_pretrained(name, output_loading_info=True, low_cpu_mem_usage=False)
        if info["missing_keys"]:
            raise ValueError(f"it lacks the weight {min(info['missing_keys'])}")
    return vae.to(DEVICE).eval().requires_grad_(False)

def load_decoder(encoder, given, model):
    """The VAE that decodes what `encoder` encoded, None for pixels. Raises UserError."""
    vae = encoder and load_vae(given or (VAE_DECODER if encoder == VAE_ENCODER else encoder))
    if vae and vae.config.latent_channels != model.in_channels:
        raise UserError(f"the VAE has {vae.config.latent_channels} channels, the model {model.in_channels}")
    return vae

def to_images(x0, vae, scale):
    """x0 (B, C, S, S) -> uint8 (B, 3, R, R): 255 (x + 1) / 2, clamped and truncated, the paper's protocol."""
    x = x0.float()
    x = torch.cat([vae.decode(part).sample for part in (x / scale).split(16)]) if vae else x
    return (255 * (x + 1) / 2).clamp(0, 255).to(torch.uint8)


# ---- 8. Training -------------------------------------------------------------------------------------------

MAX_SKIPPED = 50        # steps in a row that are not finite end the run

def resolve(args, data):
    """Fills in what the model's row of CONFIGS and the dataset decide. Raises UserError for misfits."""
    kind, config, patch = parse_name(args.model)
    args.attention_blocks = args.attention_blocks or config.attention_blocks
    args.teacher_blocks = args.teacher_blocks or config.teacher_blocks
    args.encoder_depth = args.encoder_depth or config.feature_block
    args.grid = data.shape[1] // patch
    if not args.cfg_prob:
        args.cfg_scale = 1.0        # without label dropout there is no guidance
    if args.tau is None:
        args.tau = 300_000 if args.model == "SiT-XL/2" and args.grid == 32 else config.tau
    parts = WORLD * args.gradient_accumulation_steps
    if args.batch_size % parts:
        raise UserError(f"--batch-size {args.batch_size} must divide into {parts} equal parts")
    if data.shape[1] % patch:
        raise UserError(f"{args.model} needs inputs that divide by {patch}, not {data.shape[1]}")
    if len(args.attention_blocks) != len(args.teacher_blocks):
        raise UserError("--attention-blocks and --teacher-blocks must have the same length")
    if max(args.attention_blocks) >= config.depth:
        raise UserError(f"{args.model} has no block {max(args.attention_blocks)}")
    if args.tau and not data.images.is_dir():
        raise UserError(f"phase I needs {data.images}: without it, use --tau 0")
    if (kind is MMDiT) != bool(data.captions):
        raise UserError(f"{args.model} does not fit {args.data_dir}: an MMDiT needs captions, others labels")

def restore(saved, path, model, ema, optimizer, scaler):
    """Loads a checkpoint into a run. Raises UserError for another model's."""
    load_state(model, saved["model"], path)
    load_state(ema, saved["ema"], path)
    groups = optimizer.state_dict()["param_groups"]     # this command's learning rate; REPA's are not fused
    if saved.get("opt") and "projectors.0.0.bias" in saved["model"]:
        optimizer.load_state_dict(saved["opt"] | {"param_groups": groups})
    else:
        print(f"{path} lacks optimizer or projector: what is missing starts from zero")
    if saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])

def log(run, args, **line):
    """Appends a line to metrics.jsonl, and to W&B if asked for, on the first process. Raises UserError."""
    if RANK == 0:
        with open(run / "metrics.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
        if args.wandb:
            with explained(f"--wandb {args.wandb} failed; it needs pip install wandb, and wandb login"):
                import wandb
                if wandb.run is None:
                    name = re.sub(r"\W", "-", args.exp_name)
                    wandb.init(project=args.wandb, id=name, resume="allow", config=vars(args))
                wandb.log(line, step=line["step"])

def compile_blocks(model):
    """Compiles the blocks, which share a graph. Raises UserError without a C++ compiler."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile needs a C++ compiler: install g++, or leave the flag out")
    torch._dynamo.config.optimize_ddp = False       # it would cut the graph at DDP's buckets
    for block in model.blocks:
        block.compile(dynamic=False)

def train(args):
    """Trains args.model on args.data_dir to step args.max_train_steps, from the newest whole checkpoint.
    Returns the exit code: 0, or 75 (start me again) where a signal ended it before. Raises UserError."""
    # --- processes, data, the newest checkpoint
    join_processes(args)
    data, run = Data(args.data_dir), Path(args.output_dir, args.exp_name)
    resolve(args, data)
    newest = newest_checkpoint(run / "checkpoints")
    saved = read_checkpoint(newest, args.model) if newest else {"steps": 0, "model": {}}
    step, last = saved["steps"], args.max_train_steps
    fired = saved.get("tau") if args.tau == "auto" else None        # the step at which auto ended phase I
    tau = args.tau if isinstance(args.tau, int) else fired or math.inf
    local = args.batch_size // WORLD                    # images of a step that this process sees,
    micro = local // args.gradient_accumulation_steps   # and those at a time
    rows = slice(RANK * local, (RANK + 1) * local)      # their places in the global batch

    # --- the teacher, the student, its EMA, the optimizer
    teacher, teacher_dim = None, len(saved["model"].get("projectors.0.4.bias", range(768)))
    with one_after_another():
        if step < min(tau, last):
            blocks = args.teacher_blocks if args.lambda_a else ()
            teacher = load_teacher(args.teacher, args.grid, blocks).to(DEVICE)
            teacher_dim = teacher.dim
        if data.captions:
            load_clip()
    torch.manual_seed(args.seed)
    model = build_model(
        args.model, input_size=data.shape[1], in_channels=data.shape[0], num_classes=len(data.classes),
        teacher_dim=teacher_dim, attention_blocks=args.attention_blocks,
        feature_block=args.encoder_depth).to(DEVICE)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    update_ema = torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=args.precision == "fp16")
    if newest:
        restore(saved, newest, model, ema, optimizer, scaler)
    del saved
    if args.compile:
        compile_blocks(model)

    # --- what the first process writes
    known = vars(args) | {"vae": data.vae, "scale": data.scale, "classes": data.classes}
    os.makedirs(run, exist_ok=True)
    if args.sampling_steps and RANK == 0:
        load_decoder(data.vae, args.vae, ema)       # fails now rather than at the first grid
    print(f"{run}: {args.model}, {args.precision}, {WORLD} x {DEVICE.type}, tau {args.tau}, step {step}")

    def save():
        state = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict(),
                 "scaler": scaler.state_dict(), "args": known, "steps": step, "tau": fired}
        path = run / f"checkpoints/{step:07d}.pt"
        with explained(f"{path} cannot be written"), replacing(path) as f:
            torch.save(state, f)

    stop, stopping, window = StopSignals(), False, []
    bar = tqdm(total=last, initial=step, disable=RANK > 0)
    while step < last and not stopping:
        # --- the switch: at tau, everything of phase I is dropped at once
        aligned = step < tau
        teacher = teacher if aligned else None
        data.with_images = aligned
        model.projectors.requires_grad_(aligned and args.lambda_r > 0)      # DDP waits for all that do
        net = None
        gc.collect()        # the hooks of phase I's DDP go with it
        net = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model
        pairs = [pair for pair in zip(ema.parameters(), model.parameters()) if pair[1].requires_grad]
        steps = range(step, min(tau, last) if aligned else last)
        loader = DataLoader(
            data, batch_sampler=batch_indices(len(data), args.seed, args.batch_size, rows, steps),
            num_workers=args.num_workers, worker_init_fn=ignore_stop_signals,
            pin_memory=DEVICE.type == "cuda", timeout=args.num_workers and 300)
        bar.set_description("phase I" if aligned else "phase II")

        for batch in load_batches(loader, stop):
            # --- the trigger: is it time for phase II?
            if aligned and args.tau == "auto" and step in range(args.tau_from, last, args.tau_every):
                with torch.compiler.set_stance("force_eager"):      # a compiled backward runs only once
                    cosines = measure_cosines(model, teacher, data, args, step, max(1, micro // 2))
                mean = sum(cosines) / len(cosines)
                log(run, args, step=step, cosine=mean, cosines=cosines)
                if any_process(RANK == 0 and mean < args.tau_cosine):      # one decides for all
                    fired = tau = step
                    break

            # --- the batch
            t, u, eps, xi = (x[rows] for x in draw(args.batch_size, data.shape, args.seed, step))
            x0, y = data.x0(batch, xi), data.condition(batch, u, args.cfg_prob)

            # --- teacher, while step < tau; forward; backward; in parts if memory is short
            values = 0
            for start in range(0, local, micro):
                i = slice(start, start + micro)
                with autocast(args.teacher_precision):
                    target = teacher(batch["image"][i]) if teacher else None
                with autocast(args.precision):
                    diff, repa, atta = losses(
                        net, model.process, x0[i], eps[i], t[i], y[i], target, args.lambda_r, args.lambda_a)
                loss = diff + args.lambda_r * repa + args.lambda_a * atta
                net.require_backward_grad_sync = i.stop == local        # as DDP's no_sync() sets it
                scaler.scale(loss * micro / local).backward()
                values += torch.stack([loss, diff, repa, atta]).detach() * micro / local

            # --- step, which the optimizer skips on all processes where a gradient is not finite
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
            optimizer.found_inf = (~norm.isfinite()).float()        # the GradScaler sets it only in fp16
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            # --- EMA
            update_ema(*zip(*pairs), None)      # the EMA's weights, and the model's
            step += 1

            # --- everything below is diagnostics
            bar.update()
            window.append(torch.stack([*values, norm]))
            if WORLD == 1 or step % 10 == 0:        # not each: it costs a message
                stopping = any_process(stop.caught)
            ends = stopping or step in (tau, last)
            if ends or step % args.log_every == 0:
                means = summarise(window)
                if len(window) > means["skipped_steps"]:        # else no step was taken yet
                    bar.set_postfix(loss=means["loss"])
                    log(run, args, step=step, phase=2 - aligned, **means)
                    window = []
            if RANK == 0 and (ends or step % args.checkpointing_steps == 0):
                save()
            if RANK == 0 and args.sampling_steps and step % args.sampling_steps == 0:
                draw_grid(run / f"samples/{step:07d}.png", ema, known, args)
            if stopping:
                break
        if WORLD == 1 and stop.caught and not stopping:         # it interrupted the wait for data
            stopping = True
            save()
    barrier()       # until the first process has saved
    stop.busy = False
    bar.close()
    print(f"{run}: saved after step {step}" + "; stopped, the same command resumes" * stopping)
    return 75 * stopping        # EX_TEMPFAIL

def summarise(window):
    """[(loss, diff, repa, atta, norm), ...] -> means over the steps taken, and how many were skipped."""
    table = torch.stack(window)
    if WORLD > 1:
        dist.all_reduce(table)
    taken = table[table[:, -1].isfinite()] / WORLD      # CPU-GPU sync point
    if not len(taken) and len(window) >= MAX_SKIPPED:
        raise UserError(f"no finite gradient in {len(window)} steps: use fp32, or a lower --learning-rate")
    means = dict(zip("loss loss_diff loss_repa loss_atta grad_norm".split(), taken.mean(0).tolist()))
    return means | {"skipped_steps": len(window) - len(taken)}

def measure_cosines(model, teacher, data, args, step, size):
    """The cosine of the two gradients of args.tau_images images, `size` at a time, at TRIGGER_TIMES."""
    chosen, total = permutation(len(data), args.seed, step, 1)[:args.tau_images], 0
    _, u, eps, xi = draw(len(chosen), data.shape, args.seed, step, 1)
    for i in torch.arange(RANK, len(chosen), WORLD).split(size):
        batch = to_device(default_collate([data[j] for j in chosen[i]]))
        x0, y = data.x0(batch, xi[i]), data.condition(batch, u[i], args.cfg_prob)
        given = x0, eps[i], y, teacher(batch["image"]), args.lambda_r, args.lambda_a
        total += torch.stack([gradients(model, t, *given) for t in TRIGGER_TIMES]) * len(i)
    if WORLD > 1:
        dist.all_reduce(total)
    return F.cosine_similarity(total[:, 0], total[:, 1], dim=1).tolist()


# ---- 9. Sampling -------------------------------------------------------------------------------------------

def seeded_noise(model, n, seed):
    shape = (n, model.in_channels, model.input_size, model.input_size)
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)

def draw_grid(path, model, saved, args):
    """Draws args.labels or args.captions as one PNG -> their names. saved: the model's run's args."""
    vae = load_decoder(saved["vae"], args.vae, model)
    if isinstance(model, MMDiT):
        names = args.captions or ["a red bus"]
        y, model.null_label = encode_captions(names), encode_captions([""])
    else:
        classes = saved.get("classes") or [""] * model.num_classes
        labels = args.labels or range(min(len(classes), 8))
        with explained(f"--labels {labels}: the classes are 0 to {len(classes) - 1}"):
            y, names = torch.tensor(labels, device=DEVICE), [f"{label} {classes[label]}" for label in labels]
    noise, interval = seeded_noise(model, len(y), args.seed), (args.guidance_low, args.guidance_high)
    torch.manual_seed(args.seed + 1)        # the SDE must not draw the same numbers again
    with autocast(args.precision):
        x = sample(model, noise, y, args.num_steps, args.cfg_scale, interval, args.mode)
    with replacing(path) as f:
        save_image(to_images(x, vae, saved["scale"]) / 255, f, "png", padding=1)
    return names

def sample_from(args):
    """--sample: draws a grid from a checkpoint's EMA."""
    join_processes(args)
    model, saved = load_ema(args.sample, args.model)
    names = draw_grid(args.out, model, saved, args)
    print(f"{args.out}: {args.mode} {args.num_steps}, guidance {args.cfg_scale}; {', '.join(names)}")


# ---- 10. The paper's other models: DiT, which learns the noise, and MM-DiT, which reads captions -----------

@cache
def ddpm_schedule(steps, device, dtype):
    """`steps` of DiT's 1000 timesteps, evenly spaced, and for them (6, steps): sqrt abar, sqrt(1 - abar), the
    posterior coefficients of x0 and x_t, log beta and log beta~."""
    timesteps = np.cumsum([0] + (steps - 1) * [999 / (steps - 1)]).round().astype(int)      # as DiT rounds
    # abar_t = product of 1 - beta up to t; with s, the timestep kept before t, beta = 1 - abar_t / abar_s
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[timesteps]
    abar_s = np.append(1.0, abar[:-1])
    beta = 1 - abar / abar_s
    # q(x_s | x_t, x0) = N((sqrt(abar_s) beta x0 + sqrt(1 - beta) (1 - abar_s) x_t) / (1 - abar_t), beta~)
    # beta~ = beta (1 - abar_s) / (1 - abar_t) is 0 at the first timestep, which has the second's instead
    c_0, c_t = abar_s ** 0.5 * beta / (1 - abar), (1 - beta) ** 0.5 * (1 - abar_s) / (1 - abar)
    beta_tilde = beta * (1 - abar_s) / (1 - abar)
    beta_tilde[0] = beta_tilde[1]
    table = np.stack([abar ** 0.5, (1 - abar) ** 0.5, c_0, c_t, np.log(beta), np.log(beta_tilde)])
    return timesteps.tolist(), torch.tensor(table, dtype=dtype, device=device)

def ddpm_at(i, x, steps=1000):
    """The six of ddpm_schedule at its i-th timestep; for i (B,) each is (B, 1, 1, 1)."""
    return ddpm_schedule(steps, x.device, x.dtype)[1][:, i, None, None, None]

# mean = E q(x_s | x_t, (x_t - sqrt(1 - abar) eps) / sqrt(abar)),  log var = f log beta + (1 - f) log beta~
def posterior(eps, variance, x_t, i, steps=1000):
    """Posterior mean and log variance of p(x_s | x_t), from the model's two outputs, eps and 2 f - 1."""
    signal, noise, c_0, c_t, log_beta, log_beta_tilde = ddpm_at(i, x_t, steps)
    f = (variance + 1) / 2
    return c_0 * (x_t - noise * eps) / signal + c_t * x_t, f * log_beta + (1 - f) * log_beta_tilde

# log P(x) = log(cdf(x + 1/255) - cdf(x - 1/255)) for one of 256 levels in [-1, 1]; the outermost have no end
def discretized_log_likelihood(x, mean, log_std):
    def cdf(edge):      # of the normal distribution, by the tanh approximation that DiT was trained with
        z = (edge - mean) * torch.exp(-log_std)
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3))) / 2

    above = torch.where(x > 0.999, 1, cdf(x + 1 / 255))
    below = torch.where(x < -0.999, 0, cdf(x - 1 / 255))
    return torch.log((above - below).clamp(min=1e-12))


class DDPM:
    """DiT's diffusion: the model gives the noise and a variance, and its t is an integer, 0 .. 999."""
    modes, guided_channels = ("sde", "ddpm"), 3         # of its 8, as in DiT's code

    # x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps
    def add_noise(x0, eps, t):
        t = (1000 * t).floor().clamp(max=999)
        signal, noise, *_ = ddpm_at(t.long(), x0)
        return signal * x0 + noise * eps, t

    # L_diff = mean (eps_hat - eps)^2 + L_vb,    L_vb = KL(q(x_s | x_t, x0) || p(x_s | x_t))
    def loss(out, x0, eps, x_t, t):
        """L_vb, in bits a dimension, trains only the variance: eps_hat is detached in it. At t = 0 it is
        -log p(x0 | x_t), as if x0 were pixels."""
        i, (eps_hat, variance) = t.long(), out.chunk(2, dim=1)
        mean, log_var = posterior(eps_hat.detach(), variance, x_t, i)
        _, _, c_0, c_t, _, log_beta_tilde = ddpm_at(i, x0)
        # KL(N(m, v) || N(m', v')) = (v / v' - log(v / v') - 1 + (m - m')^2 / v') / 2
        gap, difference = log_beta_tilde - log_var, c_0 * x0 + c_t * x_t - mean
        kl = (gap.exp() - gap - 1 + difference ** 2 * (-log_var).exp()) / 2
        nll = -discretized_log_likelihood(x0, mean, log_var / 2)
        bound = torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl)
        return ((eps_hat - eps) ** 2).mean() + bound.mean() / math.log(2)

    def sample(network, x, steps, mode):
        """From noise x through `steps` timesteps, nothing clipped. "ddpm", DiT's own: ancestral, with the
        learned variance. "sde", the paper's: Euler-Maruyama for dx = -x/2 dtau + dw, tau = -log abar."""
        timesteps, _ = ddpm_schedule(steps, x.device, x.dtype)
        for i in tqdm(range(steps - 1, -1, -1), desc="sampling", disable=RANK > 0, leave=False):
            eps, variance = network(x, timesteps[i], timesteps[i] / 1000).chunk(2, dim=1)
            if mode == "ddpm":
                mean, log_var = posterior(eps, variance, x, i, steps)
                std = torch.exp(log_var / 2)
            else:           # dx = -(x / 2 + score) dtau + dw,  score = -eps / sqrt(1 - abar)
                signal, noise, *_ = ddpm_at(i, x, steps)
                dtau = 2 * torch.log((ddpm_at(i - 1, x, steps)[0] if i else 1) / signal)
                mean, std = x + (x / 2 - eps / noise) * dtau, dtau ** 0.5
            x = mean + std * torch.randn_like(x) if i else mean     # the last step takes the mean
        return x


class DiT(SiT):
    """SiT's network, with noise and variance as its output, (B, 2C, S, S), and DDPM in Flow's place."""

    def __init__(self, in_channels=4, **sizes):
        super().__init__(in_channels=in_channels, out_channels=2 * in_channels, **sizes)
        self.process = DDPM


def before_attention(block, x, c):
    """One stream's q, k, v (B, heads, tokens, head_dim), and its modulations for what comes after."""
    shift, scale, *rest = block.adaLN_modulation(c).split(x.shape[-1], dim=1)
    return split_heads(block.attn.qkv(modulate(block.norm1(x), shift, scale)), block.attn.num_heads), rest

def after_attention(block, x, attended, gate_a, shift, scale, gate_m):
    x = x + gate_a[:, None] * block.attn.proj(attended)
    return x + gate_m[:, None] * block.mlp(modulate(block.norm2(x), shift, scale))


class JointBlock(nn.Module):
    """One attention over text and image; each has its own weights. The text of the last block ends there."""

    def __init__(self, dim, num_heads, last):
        super().__init__()
        self.context_block, self.x_block = Block(dim, num_heads), Block(dim, num_heads)
        if last:
            del self.context_block.attn.proj, self.context_block.norm2, self.context_block.mlp
            self.context_block.adaLN_modulation[1] = nn.Linear(dim, 2 * dim)

    def forward(self, x, text, c):
        """Image x (B, N, D), text (B, T, D), c (B, D) -> x, text, and the image's (q, k)."""
        qkv_text, rest_text = before_attention(self.context_block, text, c)
        qkv, rest = before_attention(self.x_block, x, c)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(qkv_text, qkv))               # text first
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)   # (B, T + N, D)
        a_text, a = attended.split([text.shape[1], x.shape[1]], dim=1)
        if rest_text:
            text = after_attention(self.context_block, text, a_text, *rest_text)
        return after_attention(self.x_block, x, a, *rest), text, qkv[:2]


class MMDiT(SiT):
    """The text-to-image MM-DiT, named as in the released HASTE. Its condition y is a text, (B, T, 768)."""

    def __init__(self, hidden_size=768, depth=24, num_heads=24, **sizes):
        super().__init__(hidden_size=hidden_size, depth=0, num_heads=num_heads, **sizes)
        del self.y_embedder, self.blocks
        self.context_embedder = nn.Linear(768, hidden_size)
        self.joint_blocks = nn.ModuleList(
            JointBlock(hidden_size, num_heads, last=i == depth - 1) for i in range(depth))
        self.blocks = list(self.joint_blocks)

    def initialize_weights(self):
        """Keeps torch's own initial weights, as the released code does."""

    def forward(self, x, t, y, align=False):
        """As SiT.forward, with y (B, T, 768)."""
        x, text, c = self.x_embedder(x) + self.pos_embed, self.context_embedder(y), self.t_embedder(t)
        maps = {}
        for i, block in enumerate(self.joint_blocks):
            x, text, qk = block(x, text, c)
            if align and i in self.attention_blocks:
                maps[i] = qk
            if align and i + 1 == self.feature_block:
                z = self.projectors[0](x)
        v = unpatchify(self.final_layer(x, c), self.patch_size)
        return (v, z, [maps[i] for i in self.attention_blocks]) if align else v


CLIP = "openai/clip-vit-large-patch14"

@cache
def load_clip():
    """(tokenizer, frozen text model) of CLIP. Raises UserError."""
    with explained(f"the text model {CLIP} could not be loaded; captions need pip install transformers"):
        from transformers import CLIPTextModel, CLIPTokenizer
        model = CLIPTextModel.from_pretrained(CLIP)
        return CLIPTokenizer.from_pretrained(CLIP), model.to(DEVICE).eval().requires_grad_(False)

@torch.no_grad()
def encode_captions(texts):
    """n texts -> the last hidden states of CLIP's text model, (n, 77, 768). Raises UserError."""
    tokenizer, model = load_clip()
    length = model.config.max_position_embeddings
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return model(ids.input_ids.to(DEVICE)).last_hidden_state

def read_coco(path, names):
    """For each image its captions in COCO's JSON. Raises UserError."""
    coco, captions = read_json(path), {}
    with explained(f"{path} is not COCO's JSON, or lacks the captions of an image"):
        name_of = {image["id"]: image["file_name"] for image in coco["images"]}
        for annotation in coco["annotations"]:
            captions.setdefault(name_of[annotation["image_id"]], []).append(annotation["caption"].strip())
        return [captions[os.path.basename(name)] for name in names]

def choose_captions(data, indices, u, drop):
    """A caption of each image, or "" where u (B,) < drop; the rest of the interval chooses the caption."""
    texts = []
    for i, x in zip(indices.tolist(), u.tolist()):
        captions = data.captions[data.names[i]]
        texts.append("" if x < drop else captions[int((x - drop) / (1 - drop) * len(captions))])
    return texts


# ---- 11. The command line ----------------------------------------------------------------------------------

# A flag, its type (with a + where it takes several values), its default (- for none), and what it is.
SAMPLER_FLAGS = f"""
--mode str sde                    the sampler: sde, ode or heun; for DiT sde or ddpm, its own
--num-steps int 250               steps of the sampler
--cfg-scale float 1.0             guidance scale; 1 is no guidance
--guidance-low float 0.0          guide where t is in [low, high]
--guidance-high float 1.0         guide where t is in [low, high]
for all of these
--seed int 0                      seed of everything random
--precision str -                 bf16, fp16 or fp32 (a half on a GPU, else fp32)
--compile switch -                compile the model's blocks, in training and in evaluate.py
--vae str -                       AutoencoderKL of diffusers, a name or a folder; none prepares pixels
--num-workers int {min(4, os.cpu_count())}               loader processes for each process
"""
FLAGS = f"""
what to do, if not to train
--demo switch -                   everything on letters, offline; other flags go to its training
--prepare str -                   turn this tree of class folders into a dataset at --data-dir
--sample str -                    draw --labels or --captions from this checkpoint's EMA
--bench switch -                  time --model: plain, phase I, phase II, and sampling
data
--data-dir str data/imagenet256   a prepared dataset
--resolution int 256              of the images that --prepare writes
--captions str+ -                 for --sample, what to draw; for --prepare, COCO's JSON file
alignment
--model str SiT-XL/2              SiT- or DiT-[XS,S,B,L,XL]/[2,4,8], or MMDiT
--teacher --enc-type str dinov2_vitb14    dinov2_vit[s,b,l,g]14, also with _reg, or a file
--tau --early-stop-point tau -    the step where alignment stops, never, or auto (the paper's)
--tau-from int 50000              auto: the first measurement
--tau-every int 10000             auto: steps between measurements
--tau-images int 2048             auto: images in a measurement
--tau-cosine float -0.05          auto: stop below it
--lambda-r --proj-coeff float 0.5 weight of L_REPA
--lambda-a --attn-coeff float 0.5 weight of L_ATTA
--attention-blocks int+ -         the student's, from 0 (the paper's)
--teacher-blocks int+ -           their partners, from 0 of 12 (the paper's)
--encoder-depth int -             the block whose tokens are aligned, from 1 (the paper's)
training
--output-dir str runs             where runs are
--exp-name str -                  the run's folder in it (the model's name)
--batch-size int 256              global batch, over all processes
--gradient-accumulation-steps int 1       parts of a batch, to save memory
--max-train-steps int 400000      where training ends
--learning-rate float 1e-4        of AdamW, constant
--max-grad-norm float 1.0         clip gradients to this norm; 0 does not
--ema-decay float 0.9999          of the weights that are sampled
--cfg-prob float 0.1              label dropout, for guidance
--log-every int 100               steps between lines of metrics.jsonl
--checkpointing-steps int 50000   steps between checkpoints
--sampling-steps int 10000        steps between grids of samples; 0 draws none
--wandb str -                     log to this project of Weights & Biases, too
for --demo and --bench
--compare switch -                plain, REPA, attention and HASTE side by side
--seeds int 1                     runs of each of them, from --seed
--json str -                      the file in which --bench writes its figures, too
sampling
--labels int+ -                   classes that --sample draws
--out str samples.png             the picture that --sample writes
{SAMPLER_FLAGS.replace("--cfg-scale float 1.0", "--cfg-scale float 4.0")}"""


def int_never_or_auto(text):
    return text if text in ("never", "auto") else int(text)

def parse(program, flags, argv=None):
    """The values of the flags in a table, which speaks the dialect of SiT, REPA and HASTE."""
    kinds = {"int": int, "float": float, "str": str, "tau": int_never_or_auto}
    group = parser = argparse.ArgumentParser(program, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for line in filter(None, flags.splitlines()):
        columns = re.fullmatch(r"((?:--\S+ )+)(\w+)(\+?) (?:-|(\S+)) +(.*)|.*", line)
        names, kind, several, default, text = columns.groups()
        if not names:
            group = parser.add_argument_group(line)
        elif kind == "switch":
            group.add_argument(*names.split(), action="store_true", help=text)
        else:
            group.add_argument(
                *names.split(), type=kinds[kind], nargs=several or None, default=default, help=text)
    return parser.parse_args(argv)


class Output:
    """A stream that nobody needs to read: a closed pipe or terminal does not end a run."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        self.stream.reconfigure(errors="backslashreplace")      # where a terminal lacks a letter

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(Exception):
            self.stream.write(text)
            self.stream.flush()

    def flush(self):
        """write has done it."""


@contextmanager
def one_sentence(program):
    """Prints a user error as one sentence, and ends the program with exit code 1."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, dist.DistError) as e:
        sys.exit(f"{program}: {str(e).split('UserError: ')[-1].strip()}")       # a loader's has a traceback

def main(argv=None):
    with one_sentence("haste.py"):
        args = parse("haste.py", FLAGS, argv)
        args.exp_name = args.exp_name or args.model.replace("/", "-")
        if args.demo or args.bench:
            import evaluate
            code = evaluate.demo(argv or sys.argv[1:]) if args.demo else evaluate.bench(args)
        else:
            code = prepare(args) if args.prepare else sample_from(args) if args.sample else train(args)
    sys.exit(code)


if __name__ == "__main__":
    sys.modules["haste"] = sys.modules["__main__"]      # evaluate.py imports this module, not a second one
    main()
