# SPDX-License-Identifier: MIT
"""HASTE in one file: train diffusion transformers fast, aligned with DINOv2 at first and alone later.

    REPA Works Until It Doesn't: Early-Stopped, Holistic Alignment Supercharges Diffusion Training
    Wang et al., NeurIPS 2025, https://arxiv.org/abs/2505.16792

    L = L_diff + lambda_R L_REPA + lambda_A L_ATTA    while step < tau   (phase I, holistic alignment)
    L = L_diff                                        from tau on        (phase II, nothing of it is left)

    python haste.py --demo                                                # a laptop: no GPU, no download
    python haste.py --model SiT-B/2 --gradient-accumulation-steps 4       # one GPU
    torchrun --nproc_per_node=8 haste.py --model SiT-XL/2 --tau 250000    # eight GPUs: the paper's run

The same command starts a run and resumes it. Sections 1 to 5 are the paper, 8 is the training loop; the
rest is what a run needs besides: data, files, pictures, faults, flags. DiT and MM-DiT, the paper's other
backbones, are section 10, which a reader who wants SiT alone can skip: all before it is said for SiT.
The demo's letters, their teacher and their judge stand in evaluate.py.

    paper     here       shape                  what it is
    x_0       x0         (B, C, S, S)           the clean sample: a VAE latent, or pixels in [-1, 1]
    t         t          (B,)                   time in [0, 1]: 0 is data, 1 is noise
    x_t       x_t        (B, C, S, S)           (1 - t) x0 + t eps
    v         v          (B, C, S, S)           the velocity; its target is eps - x0
    h         h          (B, N, D)              the student's tokens after its feature block
    proj(h)   z          (B, N, D_T)            their projection
    y         y          (B, N, D_T)            the teacher's final-normed patch tokens
    A^S, A^T  qk         (B, heads, N, d) each  attention maps, as the [(q, k), ...] of the aligned blocks
              labels     (B,)                   the condition; of MM-DiT, encoded captions (B, T, 768)
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import re
import signal
import socket
import sys
import time
import warnings
import zipfile
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")     # torch.hub, too, unpickles nothing
if "RANK" in os.environ and sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # torchrun, killed outright, takes its processes along

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:     # Windows
    fcntl = resource = None


class BadInput(ValueError):
    """A user's mistake, told in one sentence: the command line prints it and exits with code 2."""
    code = 2

    def __init__(self, sentence):
        if "Original Traceback" in sentence:        # in which a loader's process hands it over
            sentence = sentence.rpartition("BadInput: ")[2].strip()
        super().__init__(sentence)


class Failure(RuntimeError):
    """What ends a run that was asked for rightly, told in one sentence; exit code 1."""
    code = 1


AGAIN = 75      # the exit code that says "start me again" (EX_TEMPFAIL)


# ---- 1. The student: SiT -----------------------------------------------------------------------------------

# Attention blocks are counted from 0, the teacher's in a teacher of 12; the feature block is counted from 1.
Row = namedtuple("Row", "depth width heads attention_blocks teacher_blocks feature_block projector_dim tau")
MODELS = {
    "XS": Row(6, 128, 4, (1, 2, 3), (9, 10, 11), 4, 256, 450),                  # not in the paper: the demo's
    "S": Row(12, 384, 6, (2, 3, 4), (7, 9, 11), 5, 2048, 100_000),              # not in the paper: B's row
    "B": Row(12, 768, 12, (2, 3, 4), (7, 9, 11), 5, 2048, 100_000),
    "L": Row(24, 1024, 16, (4, 5, 6, 7), (8, 9, 10, 11), 8, 2048, 250_000),
    "XL": Row(28, 1152, 16, (4, 5, 6, 7), (8, 9, 10, 11), 8, 2048, 250_000),    # SiT's tau is 300K at 512
}
NAMES = [f"SiT-{size}/{patch}" for size in MODELS for patch in (2, 4, 8)]


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x):
        return split_heads(self.qkv(x), self.num_heads)

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.proj(attend(q, k, v)), (q, k)       # views: handing them out costs nothing


def split_heads(qkv, heads):
    """What a Linear(D, 3 D) gives, (B, N, 3 D) -> q, k, v: (B, heads, N, head_dim) each."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)       # (B, N, D)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (the DiT paper, section 3.2)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, act_layer=functools.partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        x_a, rest = self.before(x, c)
        a, qk = self.attn(x_a)
        return self.after(x, a, *rest), qk

    def before(self, x, c):
        """What goes into attention, and the four modulations (B, D) of what comes after it."""
        shift_a, scale_a, *rest = self.adaLN_modulation(c).split(x.shape[-1], dim=1)
        return modulate(self.norm1(x), shift_a, scale_a), rest

    def after(self, x, a, gate_a, shift_m, scale_m, gate_m):
        x = x + gate_a[:, None] * a
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, dim, out_features):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimestepEmbedder(nn.Module):
    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        half = self.frequencies // 2
        omega = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device))
        angle = t.float()[:, None] * omega
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """One row a class, and with label dropout a last row for the null label of classifier-free guidance."""

    def __init__(self, num_classes, dim, dropout_prob):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), dim)

    def drop(self, labels, u):
        """Puts the null label where u (B,), uniform in [0, 1), lies below the dropout probability."""
        return torch.where(u < self.dropout_prob, self.num_classes, labels)

    def forward(self, labels):
        return self.embedding_table(labels)


def sincos_positions(dim, side):
    """Fixed positions (1, side^2, dim): half the channels encode the column, half the row."""
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side)[:, None] * omega
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)                                     # (side, dim / 2)
    columns, rows = wave[None].expand(side, -1, -1), wave[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, dim).float()


class Backbone(nn.Module):
    """A diffusion transformer that HASTE can align: it shows its image tokens, and q and k of its attention.

    Here is what SiT, DiT and MM-DiT share; each adds `embed`, its blocks and its own parameters.
    Raises BadInput for sizes that do not fit each other."""

    outputs = 1         # of each channel: the velocity; DiT's 2 are the noise and its variance
    guided = None       # how many output channels guidance acts on: all

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads,
                 attention_blocks, feature_block):
        super().__init__()
        if input_size % patch_size:
            raise BadInput(f"an input of {input_size} x {input_size} does not divide into patches of "
                           f"{patch_size}: choose another resolution or another model")
        if hidden_size % num_heads or hidden_size % 4:
            raise BadInput(f"a width of {hidden_size} does not divide into {num_heads} heads, or not by 4")
        if not (1 <= feature_block <= depth and all(0 <= b < depth for b in attention_blocks)):
            raise BadInput(f"a model of {depth} blocks lacks one of the attention blocks "
                           f"{tuple(attention_blocks)}, from 0, or feature block {feature_block}, from 1")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.attention_blocks, self.feature_block = tuple(attention_blocks), feature_block
        self.grad_checkpoint = False    # the backward pass computes blocks anew, for want of memory

    def unpatchify(self, x):
        p, side = self.patch_size, self.input_size // self.patch_size
        channels = self.outputs * self.in_channels
        x = x.reshape(-1, side, side, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, channels, self.input_size, self.input_size)

    def forward(self, x, t, y, align=False):
        """x (B, C, S, S), t (B,), labels y (B,), or MM-DiT's texts (B, T, D_C) -> v (B, C, S, S).

        With align: (v, z, qk), z (B, N, teacher_dim) the projected tokens, qk a list of the unscaled (q, k),
        each (B, heads, N, head_dim), of attention_blocks."""
        h, c, *text = self.embed(x, t, y)       # (B, N, D), (B, D), and of MM-DiT alone (B, T, D)
        kept = {}
        for i, block in enumerate(self.blocks):
            run = functools.partial(checkpoint, block, use_reentrant=False) if self.grad_checkpoint else block
            h, qk, *text = run(h, c, *text)
            if align and i in self.attention_blocks:
                kept[i] = qk
            if align and i + 1 == self.feature_block:
                z = self.projectors[0](h)
        v = self.unpatchify(self.final_layer(h, c))
        return (v, z, [kept[i] for i in self.attention_blocks]) if align else v


def xavier(module):
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


def build_projector(dim, projector_dim, teacher_dim):
    return nn.Sequential(
        nn.Linear(dim, projector_dim), nn.SiLU(),
        nn.Linear(projector_dim, projector_dim), nn.SiLU(), nn.Linear(projector_dim, teacher_dim))


class SiT(Backbone):
    """The scalable interpolant transformer with REPA's projector, its parameters named as SiT and REPA do.

    Its condition is a label, (B,). Dropping labels (`drop`) is left to the training loop, whose random
    numbers are the run's own."""

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 num_classes=1000, class_dropout_prob=0.1, attention_blocks=(4, 5, 6, 7), feature_block=8,
                 teacher_dim=768, projector_dim=2048):
        super().__init__(input_size, patch_size, in_channels, hidden_size, depth, num_heads,
                         attention_blocks, feature_block)
        # In REPA's order, because the optimizer states in its checkpoints count parameters in that order.
        positions = sincos_positions(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        with torch.random.fork_rng(devices=()):     # the rest starts the same whatever the teacher's width
            self.projectors = nn.ModuleList([build_projector(hidden_size, projector_dim, teacher_dim)])
            self.projectors.apply(xavier)
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * self.outputs * in_channels)
        self.initialize_weights()

    def initialize_weights(self):
        for part in (self.x_embedder, self.t_embedder, self.blocks, self.final_layer):
            part.apply(xavier)
        for m in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(m.weight, std=0.02)
        for m in [*self.blocks, self.final_layer]:      # adaLN-Zero: each block starts as the identity
            nn.init.zeros_(m.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)  # and the whole as v = 0

    @property
    def null_label(self):
        if not self.y_embedder.dropout_prob:
            raise BadInput("a model trained without label dropout has no null label to guide away from")
        return self.y_embedder.num_classes

    @staticmethod
    def sizes_in(state, args):
        """What build_model has to know of a state dict, and of the args of its run."""
        rows = len(state["y_embedder.embedding_table.weight"])
        drops = rows != args.get("num_classes")     # then the last row is the null label's
        return {"num_classes": rows - drops, "class_dropout_prob": 0.1 * drops}

    def drop(self, labels, u):
        return self.y_embedder.drop(labels, u)

    def embed(self, x, t, y):
        return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)


# ---- 2. The teacher: DINOv2, frozen ------------------------------------------------------------------------

DINOV2 = [f"dinov2_vit{size}14{registers}" for registers in ("", "_reg") for size in "sblg"]
DINOV2_REPO, DINOV2_COMMIT = "facebookresearch/dinov2", "b8931f7bf91576930313be2c6d6af376033b35f0"


class Teacher(nn.Module):
    """A frozen ViT that shows its patch tokens and, by hooks on `attn.qkv`, what makes its attention maps.

    vit: DINOv2 as torch.hub gives it, or a timm VisionTransformer; blocks: whose maps to show, from 0;
    grid: the student's tokens a side, to which positions and images are resampled.
    Raises BadInput for a network of another structure."""

    def __init__(self, vit, blocks, grid, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
        super().__init__()
        attentions = [getattr(block, "attn", None) for block in getattr(vit, "blocks", [])]
        plain = attentions and all(
            isinstance(getattr(a, "qkv", None), nn.Linear) and getattr(a, "q_bias", None) is None
            and type(getattr(a, "q_norm", nn.Identity())) is nn.Identity for a in attentions)
        if not plain or getattr(vit, "pos_embed", None) is None or getattr(vit, "rope", None) is not None:
            raise BadInput(f"a {type(vit).__name__} of this kind cannot teach: it lacks what DINOv2 has, "
                           f"absolute positions and a linear blocks[i].attn.qkv with no norm behind it")
        if not all(0 <= b < len(attentions) for b in blocks):
            raise BadInput(f"a teacher of {len(attentions)} blocks lacks one of the blocks {tuple(blocks)}")
        self.blocks, self.grid, self.dim = blocks, grid, vit.embed_dim
        self.size = grid * vit.patch_embed.patch_size[0]
        if hasattr(vit, "set_input_size"):      # timm resamples the positions itself
            vit.set_input_size(img_size=self.size)
        else:                                   # once and for all, where the hub's code would at each forward
            vit.pos_embed.data = resample_abs_pos_embed(vit.pos_embed.data, [grid, grid], num_prefix_tokens=1)
        self.vit = vit.eval().requires_grad_(False)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)
        self.kept = {}
        for b in blocks:
            attentions[b].qkv.register_forward_hook(lambda module, args, out, b=b: self.kept.update({b: out}))

    @torch.no_grad()
    def forward(self, images):
        """images (B, 3, H, W) uint8 -> features (B, N, dim), and qk as the student's."""
        x = (images - self.mean) / self.std
        if x.shape[-1] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic")
        N = self.grid ** 2      # patch tokens come last: before them stand class and register tokens
        features = self.vit.forward_features(x)
        features = features["x_norm_patchtokens"] if isinstance(features, dict) else features[:, -N:]
        qkv = [split_heads(self.kept[b][:, -N:], self.vit.blocks[b].attn.num_heads) for b in self.blocks]
        self.kept.clear()
        return features, [(q, k) for q, k, _ in qkv]


def load_teacher(name, grid, blocks, repo=None):
    """The Teacher of that name: a DINOv2 of torch.hub, timm/NAME, or a file with the arguments ("config") and
    the weights ("model") of a timm VisionTransformer. blocks are those of a ViT of 12 blocks; in a ViT of
    another depth they keep their distance from the last. Raises BadInput."""
    mean, std, hint = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ""
    try:
        if name in DINOV2:
            weights = f"{name.removesuffix('_reg')}/{name}{'4' * name.endswith('_reg')}_pretrain.pth"
            hint = (f"; without internet, pass --teacher-repo a clone of github.com/{DINOV2_REPO} and put "
                    f"https://dl.fbaipublicfiles.com/dinov2/{weights} into {torch.hub.get_dir()}/checkpoints")
            where, source = (repo, "local") if repo else (f"{DINOV2_REPO}:{DINOV2_COMMIT}", "github")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")     # of the hub's code, which misses xFormers
                vit = torch.hub.load(where, name, source=source, trust_repo=True, skip_validation=True)
        elif name.startswith("timm/"):
            vit = timm.create_model(name[5:], pretrained=True, num_classes=0)
            mean, std = vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"]
        elif Path(name).is_file():
            saved = load_file(name)
            vit = VisionTransformer(**saved["config"])
            vit.load_state_dict(saved["model"])
        else:
            raise BadInput(f"unknown teacher {name!r}: choose {', '.join(DINOV2)}, timm/NAME, or a file")
    except BadInput:
        raise
    except Exception as e:      # others' code, and files from anywhere, can make it anything
        raise BadInput(f"the teacher {name} could not be loaded ({brief(e)}){hint}") from e
    depth = len(getattr(vit, "blocks", []))
    return Teacher(vit, [b - 12 + depth for b in blocks], grid, mean, std)


# ---- 3. The losses -----------------------------------------------------------------------------------------

MAX_HEADS = 12      # student head i learns from teacher head i, for the first 12; the others are free
MAP_PIECE = 2 ** 21     # entries of the attention maps that exist at a time


def full(x):
    """Halves to fp32: to normalise, or to take a softmax, in fp16 is a known source of NaN."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# L_REPA = - mean over images and tokens of cos(z, y)
def feature_loss(z, y):
    """z, y (B, N, D) -> a scalar in [-1, 1]; in fp32 whatever the autocast."""
    return -F.cosine_similarity(full(z), full(y), dim=-1).mean()


# L_ATTA = - mean over block pairs, images, heads and rows i of sum_j A^T_ij log A^S_ij
#          with A = softmax(q k^T / sqrt(d)) of the teacher and of the student
class CrossEntropyOfMaps(torch.autograd.Function):
    """(q, k) (G, N, head_dim) of student and teacher -> the mean cross-entropy of the rows of their G maps.

    The gradient by the student's logits is A^S - A^T. It is taken on the way, from a piece of the maps at a
    time: so memory is linear in N, and autograd, which would keep the maps, is slower even at N = 256."""

    @staticmethod
    def forward(ctx, q, k, q_t, k_t):
        (G, N, d), count = q.shape, q[..., 0].numel()
        scale, scale_t, total = d ** -0.5, q_t.shape[-1] ** -0.5, q.new_zeros(())
        piece = MAP_PIECE if q.device.type == "cpu" or N > 1024 else 4 * MAP_PIECE      # fewer launches
        dq, dk = torch.empty_like(q), torch.zeros_like(k)
        maps, rows = max(1, piece // N ** 2), max(1, min(N, piece // N))
        for m, i in itertools.product(range(0, G, maps), range(0, N, rows)):
            m, i = slice(m, m + maps), slice(i, i + rows)
            log_a = F.log_softmax(scale * q[m, i] @ k[m].mT, dim=-1)            # (maps, rows, N)
            a_t = F.softmax(scale_t * q_t[m, i] @ k_t[m].mT, dim=-1)
            total -= (a_t * log_a).sum()
            d_logits = log_a.exp_().sub_(a_t)
            dq[m, i] = d_logits @ k[m]
            dk[m] += d_logits.mT @ q[m, i]
        ctx.save_for_backward(dq.mul_(scale / count), dk.mul_(scale / count))
        return total / count

    @staticmethod
    def backward(ctx, grad):
        dq, dk = ctx.saved_tensors
        return grad * dq, grad * dk, None, None


def attention_loss(student_qk, teacher_qk):
    """Two lists of (q, k), (B, heads, N, head_dim) each -> a scalar; in fp32 whatever the autocast."""
    total = 0
    for (q, k), (q_t, k_t) in zip(student_qk, teacher_qk, strict=True):
        heads = min(q.shape[1], q_t.shape[1], MAX_HEADS)
        with torch.autocast(q.device.type, enabled=False):
            paired = [full(x[:, :heads]).flatten(0, 1) for x in (q, k, q_t, k_t)]
            total = total + CrossEntropyOfMaps.apply(*paired)
    return total / len(student_qk)


MODES = "sde", "ode", "heun", "ddpm"


class Flow:
    """What SiT learns: the velocity along the straight line from x0 to eps."""
    modes, grid_mode, max_steps = ("sde", "ode", "heun"), "ode", math.inf       # of sampling

    # x_t = (1 - t) x0 + t eps
    @staticmethod
    def noised(x0, eps, t):
        """-> x_t, and the time as the network wants it."""
        s = t.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * eps, t

    # L_diff = mean (v(x_t, t) - (eps - x0))^2
    @staticmethod
    def loss(v, x0, eps, x_t, t):
        return ((v - (eps - x0)) ** 2).mean()


def diffusion_of(model):
    """Flow, or what the model (in DDP or not) names instead: a DiT, DDPM (section 10)."""
    return getattr(getattr(model, "module", model), "diffusion", Flow)


def losses(model, x0, eps, t, labels, target=None, lambda_r=1.0, lambda_a=1.0):
    """(L_diff, L_REPA, L_ATTA), unweighted, a term of weight 0 left out. target: what the teacher says of the
    same images; None in phase II."""
    diffusion, repa, atta = diffusion_of(model), x0.new_zeros(()), x0.new_zeros(())
    x_t, t = diffusion.noised(x0, eps, t)
    if target is None:
        v = model(x_t, t, labels)
    else:
        v, z, qk = model(x_t, t, labels, align=True)
        repa = feature_loss(z, target[0]) if lambda_r else repa
        atta = attention_loss(qk, target[1]) if lambda_a else atta
    return diffusion.loss(full(v), x0, eps, x_t, t), repa, atta


# ---- 4. Termination: the gradient-angle trigger of appendix A.2 --------------------------------------------

TRIGGER_TIMES = (0.02, 0.1, 0.5, 0.8)


# cos(grad (lambda_R L_REPA + lambda_A L_ATTA), grad L_diff), by the parameters of the feature block
def gradient_cosine(model, t, batches, lambda_r, lambda_a):
    """The cosine at time t between the two gradients, each first averaged over the images of all processes.

    batches: an iterable of (share of these images in all, x0, eps, labels, target)."""
    params = list(model.blocks[model.feature_block - 1].parameters())
    grads = torch.zeros(2, sum(p.numel() for p in params), device=params[0].device)
    for share, x0, eps, labels, target in batches:
        times = torch.full((len(x0),), t, device=x0.device)
        diff, repa, atta = losses(model, x0, eps, times, labels, target, lambda_r, lambda_a)
        for total, loss in zip(grads, (lambda_r * repa + lambda_a * atta, diff)):
            g = torch.autograd.grad(share * loss, params, retain_graph=True, materialize_grads=True)
            total += torch.cat([x.flatten() for x in g])
    if dist.is_initialized():
        dist.all_reduce(grads)
    return F.cosine_similarity(*grads, dim=0).item()


# ---- 5. The samplers ---------------------------------------------------------------------------------------

def check_sampler(model, mode, steps):
    """Raises BadInput for a sampler, or a number of steps, that the model does not have."""
    diffusion = diffusion_of(model)
    if mode not in diffusion.modes:
        raise BadInput(f"unknown sampler {mode!r} for this model: choose one of {', '.join(diffusion.modes)}")
    if not 1 <= steps <= diffusion.max_steps:
        raise BadInput(f"this model is sampled in at most {diffusion.max_steps} steps, not in {steps}")


@torch.no_grad()
def sample(model, noise, labels, steps=250, cfg_scale=1.0, guidance=(0.0, 1.0), mode="sde", progress=False):
    """Takes noise (B, C, S, S) from t = 1 to t = 0, in fp64, with `steps` evaluations (Heun: 2 steps - 1).

    "sde", the paper's protocol: Euler-Maruyama with diffusion w = 2t, t from 1 to 0.04, and the mean alone
    from there to 0. "ode", "heun": the probability flow. Guidance acts where t lies in [*guidance].
    A DiT has samplers of its own, "ddpm" among them: see ddpm_sample."""
    check_sampler(model, mode, steps)
    if cfg_scale != 1:
        null = torch.as_tensor(model.null_label, device=labels.device).expand_as(labels)
    wide = torch.float32 if noise.device.type == "mps" else torch.float64       # MPS has no fp64
    channels = getattr(model, "guided", None)

    # v = v_null + cfg_scale (v - v_null)
    def velocity(x, t, guided):
        x, t = x.to(noise.dtype), torch.full((len(x),), t, dtype=noise.dtype, device=x.device)
        if not guided:
            return model(x, t, labels).to(wide)
        v, v_null = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null])).to(wide).chunk(2)
        v[:, :channels] = v_null[:, :channels] + cfg_scale * (v[:, :channels] - v_null[:, :channels])
        return v

    def guides(t):
        return cfg_scale != 1 and guidance[0] <= t <= guidance[1]

    if diffusion_of(model) is DDPM:     # section 10
        return ddpm_sample(velocity, noise.to(wide), steps, guides, mode, progress)
    if mode == "sde":
        times = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
    else:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    x = noise.to(wide)
    for t, t_next in tqdm(list(itertools.pairwise(times)), desc="sampling", disable=not progress):
        guided = guides(t)
        dt, v = t_next - t, velocity(x, t, guided)
        if mode == "sde":
            w, score = 2 * t, -(x + (1 - t) * v) / t
            x = x + (v - 0.5 * w * score) * dt      # affine in v, so that guiding v guides the drift
            if t_next > 0:
                x = x + math.sqrt(w * -dt) * torch.randn_like(x)
        elif mode == "heun" and t_next > 0:
            x = x + 0.5 * (v + velocity(x + v * dt, t_next, guided)) * dt
        else:
            x = x + v * dt
    return x


# ---- 6. Data: images and their latents ---------------------------------------------------------------------

VAE_ENCODER, VAE_DECODER, VAE_SCALE = "stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema", 0.18215
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
TODO, SKIPPED = -2, -1      # in labels.npy: an image still to be prepared, and one that cannot be read


def load_array(path, kind, *shape, hint="delete its folder, and --prepare it again"):
    """A memory map of the .npy file, of this kind of dtype and this shape, None for any size, or BadInput."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise BadInput(f"{path} is missing or cut short ({brief(e)}): {hint}") from e
    if array.dtype.kind != kind or len(array.shape) != len(shape) or any(
            want not in (None, size) for want, size in zip(shape, array.shape)):
        raise BadInput(f"{path} is {array.dtype} {array.shape}, where {shape} belongs: {hint}")
    return array


def new_array(path, dtype, shape):
    """A memory map of a new .npy file that has all the disk space it will need."""
    array = np.lib.format.open_memmap(path, "w+", dtype, tuple(map(int, shape)))
    if hasattr(os, "posix_fallocate"):      # not on macOS and Windows
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, array.offset + array.nbytes)
    return array


class Files:
    """Files in place of an array: files[i] reads the i-th. Raises BadInput where all are not of one size."""

    def __init__(self, paths, read, alike=False):
        self.paths, self.read = paths, read
        sizes = [os.path.getsize(path) for path in paths] if alike else []
        if len(set(sizes)) > 1:
            raise BadInput(f"{paths[np.argmin(sizes)]} has {min(sizes)} bytes, others up to {max(sizes)}: it "
                           f"is cut short")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return self.read(self.paths[i])
        except Exception as e:      # a broken file can make Pillow raise anything
            raise BadInput(f"{self.paths[i]} cannot be read ({brief(e)})") from e


def files_in(folder, endings):
    found = [p for p in folder.rglob("*") if p.suffix.lower() in endings]
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


class Data(Dataset):
    """The dataset in a folder, as --prepare, or REPA's or U-ViT's preprocessing, wrote it.

    data[indices, want_images] is {"labels" (B,), "moments" (B, 2C, S, S): the VAE's mean and std, "images"
    (B, 3, R, R) uint8}; images only where wanted, or where they are what is learned (vae is None).
    With captions (section 10), "labels" are the encodings of those that data[indices, want_images, picks]
    picks. Raises BadInput for a folder that holds no dataset, or half of one."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        self.captions = None
        if (folder / "dataset.json").is_file() and (folder / "labels.npy").is_file():
            facts = read_json(folder / "dataset.json", "resolution", "classes", "vae", "scale")
            labels = load_array(folder / "labels.npy", "i", None)
            if todo := np.sum(labels == TODO):
                raise BadInput(f"{folder} lacks {todo} of its {len(labels)} images: run its --prepare again")
            self.slots, side = np.flatnonzero(labels != SKIPPED), facts["resolution"]
            self.images = load_array(folder / "images.npy", "u", len(labels), 3, side, side)
            self.moments = load_array(folder / "moments.npy", "f", len(labels), None, None, None) \
                if facts["vae"] else None
            if "text_encoder" in facts:
                self.captions = prepared_captions(folder, facts)
        elif (folder / "0.npy").is_file():      # U-ViT's
            self.images, self.moments, self.captions = open_uvit(folder)
            self.slots = np.arange(len(self.moments))
            labels, facts = 0 * self.slots, {"vae": VAE_ENCODER, "scale": VAE_SCALE, "classes": [""]}
        elif (folder / "vae-sd").is_dir():      # REPA's: an image file and an array file each
            self.images = Files(files_in(folder / "images", ENDINGS), read_image)
            self.moments = Files(files_in(folder / "vae-sd", [".npy"]),
                                 lambda p: (x := np.load(p)).reshape(x.shape[-3:]), alike=True)
            n, listing = len(self.moments), folder / "vae-sd" / "dataset.json"
            if not n or len(self.images) != n or not listing.is_file():
                raise BadInput(f"{folder} has {len(self.images)} files in images/ and {n} latents in "
                               f"vae-sd/: they must be as many, and listed in vae-sd/dataset.json")
            names = [p.relative_to(folder / "vae-sd").as_posix() for p in self.moments.paths]
            of = dict(read_json(listing, "labels")["labels"] or [])
            if missing := set(names) - of.keys():
                raise BadInput(f"{listing} gives no label to {min(missing)}")
            self.slots, labels = np.arange(n), np.array([of[name] for name in names])
            facts = {"vae": VAE_ENCODER, "scale": VAE_SCALE, "classes": list(range(labels.max() + 1))}
        else:
            there = folder.is_dir() and any(folder.iterdir())
            what = "holds no dataset" if there else "is empty or missing"
            raise BadInput(f"--data-dir {folder} {what}; to make one:  python haste.py --prepare IMAGES "
                           f"--data-dir {folder}")
        self.labels, self.classes = labels[self.slots], facts["classes"]
        self.vae, self.scale = facts["vae"], facts["scale"]
        if not len(self):
            raise BadInput(f"{folder} holds no image that could be read")
        if not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise BadInput(f"{folder} has labels from {self.labels.min()} to {self.labels.max()}, where its "
                           f"{len(self.classes)} classes are counted from 0")
        channels, *size = (self.moments if self.vae else self.images)[self.slots[0]].shape
        self.resolution = self.images[self.slots[0]].shape[-1] if self.images is not None else 8 * size[0]
        self.shape = (channels // 2 if self.vae else channels, *size)       # of a clean sample x0

    def __reduce__(self):       # a spawned loader opens the files itself: pickle would send their content
        return Data, (self.folder,)

    def __len__(self):
        return len(self.slots)

    def __getitem__(self, request):
        indices, want_images, *picks = request
        slots = self.slots[indices]
        labels = self.captions.encoded(slots, *picks) if self.captions else self.labels[indices]
        batch = {"labels": torch.from_numpy(labels)}
        if self.vae:
            batch["moments"] = torch.from_numpy(np.stack([self.moments[i] for i in slots]))
        if want_images or not self.vae:
            side, images = self.resolution, [self.images[i] for i in slots]
            if odd := [i for i, x in zip(slots, images) if x.shape[1:] != (side, side)]:
                raise BadInput(f"{self.images.paths[odd[0]]} is not {side} x {side}: crop all to one size")
            batch["images"] = torch.from_numpy(np.stack(images))
        return batch

    def x0(self, batch, xi):
        """The clean sample: pixels in [-1, 1], or scale (mean + std xi), drawn from the VAE's posterior."""
        if not self.vae:
            return batch["images"] / 127.5 - 1
        mean, std = batch["moments"].chunk(2, dim=1)
        return self.scale * (mean + std * xi)


# What chance decides is a function of (seed, step, place in the global batch): a resumed run, or one on
# another number of processes, sees the same images in the same order, with the same times and noise.

@functools.lru_cache(maxsize=2)
def permutation(n, *key):
    return np.random.default_rng(key).permutation(n)


def requests(n, args, rows, steps, want_images):
    """What to ask Data for at these steps: rows of the global batch, from an endless row of permutations."""
    for step in steps:
        places = range(step * args.batch_size + rows.start, step * args.batch_size + rows.stop)
        yield np.array([permutation(n, args.seed, p // n)[p % n] for p in places]), want_images


def draw(n, shape, device, *key):
    """For a global batch of n: t and u (n,), uniform in [0, 1), eps and xi (n, *shape), normal."""
    hashed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    g = torch.Generator(device).manual_seed(hashed >> 1)
    uniform = torch.rand(2, n, generator=g, device=device)
    return *uniform, *torch.randn(2, n, *shape, generator=g, device=device)


def upright(image):
    """A PIL image as its EXIF orientation means it, in RGB."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):      # 16-bit grey, which convert() would clip to white
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path):
    """An image file as uint8 (3, H, W)."""
    with Image.open(path) as image:
        return np.asarray(upright(image)).transpose(2, 0, 1)


def center_crop(image, size):
    """ADM's crop of a PIL image: halve with BOX while enough is left, then BICUBIC, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Crops(Dataset):
    """crops[i] reads image i and puts it, upright, into slot i of images.npy; gives (i, error or None)."""

    def __init__(self, folder, names, size, path):
        self.folder, self.names, self.size, self.path = folder, names, size, path
        self.images = np.load(path, mmap_mode="r+")

    def __reduce__(self):
        return Crops, (self.folder, self.names, self.size, self.path)

    def __getitem__(self, i):
        path = os.path.join(self.folder, self.names[i])
        try:
            if not os.path.isfile(path):        # nothing would ever come out of a pipe
                raise OSError("no regular file")
            with Image.open(path) as image:
                if max(image.size) > 100 * min(image.size):     # it would become too large on the way
                    raise ValueError(f"{image.width} x {image.height} is no picture")
                self.images[i] = np.asarray(center_crop(upright(image), self.size)).transpose(2, 0, 1)
            return i, None
        except Exception as e:      # a broken file can make Pillow raise anything
            return i, brief(e)


def list_images(source, classes=True):
    """The image files below source/CLASS, or anywhere below source, as sorted paths, following links but
    never in a circle."""
    names, seen = [], set()
    for folder, folders, files in os.walk(source, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
        elif folder != source or not classes:
            paths = (os.path.join(folder, f) for f in files if f.lower().endswith(ENDINGS))
            names += [os.path.relpath(path, source) for path in paths]
        seen.add(real)
    if not names:
        raise BadInput(f"--prepare {source}: it has no images ({', '.join(ENDINGS)}) in class folders"
                       f"{'' if classes else ', nor any with captions'}")
    return sorted(names)


@torch.no_grad()
def prepare(args):
    """--prepare: class folders become images.npy (n, 3, R, R) uint8, moments.npy (n, 2C, S, S) fp32, and
    labels.npy, where an entry, written last, says that an image is done: the same command goes on. Of images
    with captions, contexts.npy is what the text encoder says of these."""
    rank, world, device = setup(args)
    source, out, size = args.prepare, Path(args.data_dir), args.resolution or 256
    if not os.path.isdir(source):
        raise BadInput(f"--prepare {source}: there is no such folder")
    texts = find_captions(source, args.captions)        # {name: captions}, or None
    if args.text_encoder and not texts:
        raise BadInput(f"--text-encoder: {source} has no text files beside its images: say --captions FILE")
    names = list(texts) if texts else list_images(source)
    class_of = ["" if texts else name.split(os.sep)[0] for name in names]
    classes = sorted(set(class_of))
    vae = load_vae(args.vae or VAE_ENCODER, device) if args.vae != "none" else None

    def encode(images):
        latent = vae.encode(torch.from_numpy(images).to(device) / 127.5 - 1).latent_dist
        return torch.cat([latent.mean, latent.std], dim=1).cpu().numpy()

    # --- the arrays, with all the disk space that they will need; dataset.json comes last, and stands for all
    n = len(names)
    shapes = {"labels": (np.int64, n), "images": (np.uint8, n, 3, size, size)}
    if vae:
        shapes["moments"] = (np.float32, n, *encode(np.zeros((1, 3, size, size), np.uint8)).shape[1:])
    facts = {"resolution": size, "classes": classes, "vae": (args.vae or VAE_ENCODER) if vae else None,
             "scale": vae.config.scaling_factor if vae else 1.0}
    if texts:
        encoder = load_text_encoder(args.text_encoder or CLIP, device)
        empty = encoder([""])[0].half().cpu().numpy()
        first = np.cumsum([0, *map(len, texts.values())])       # image i's contexts: first[i] to first[i + 1]
        shapes |= {"contexts": (np.float16, first[-1], *empty.shape),
                   "empty_context": (np.float16, *empty.shape)}
        facts |= {"text_encoder": args.text_encoder or CLIP, "captions": list(texts.values())}
    if rank == 0 and not (out / "dataset.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        there = {f.name.removesuffix(".part") for f in out.iterdir()}       # .part: where one was killed
        if other := there - {"files.json", "dataset.json", *(f"{name}.npy" for name in shapes)}:
            raise BadInput(f"--data-dir {out} holds other things ({min(other)}): name a new folder")
        for name, (dtype, *shape) in shapes.items():
            array = new_array(out / f"{name}.npy", dtype, shape)
            if name == "labels":
                array[:] = TODO
            elif name == "empty_context":
                array[:] = empty
        write_json(out / "files.json", names)
        write_json(out / "dataset.json", facts)
    barrier()
    if read_json(out / "dataset.json") != facts or read_json(out / "files.json") != names:
        raise BadInput(f"{out} was prepared from other images or with other flags: choose another --data-dir")

    # --- this process's share of what is left to do
    for name, (dtype, *shape) in shapes.items():
        load_array(out / f"{name}.npy", np.dtype(dtype).kind, *shape)   # to write, numpy would lengthen it
    arrays = {name: np.load(out / f"{name}.npy", mmap_mode="r+") for name in shapes}
    todo = np.flatnonzero(arrays["labels"] == TODO)
    barrier()       # all have looked before any writes
    crops = DataLoader(Crops(source, names, size, out / "images.npy"), sampler=todo[rank::world].tolist(),
                       batch_size=32, num_workers=args.num_workers, collate_fn=list)
    with tqdm(total=len(names), initial=len(names) - len(todo), unit=" images", disable=rank > 0) as bar:
        for results in crops:
            good = [i for i, error in results if error is None]
            if vae and good:
                arrays["moments"][good] = encode(arrays["images"][good])
            if texts and good:
                context = encoder([text for i in good for text in texts[names[i]]]).half()
                at = np.concatenate([np.arange(first[i], first[i + 1]) for i in good])
                arrays["contexts"][at] = context.cpu().numpy()
            for i, error in results:
                arrays["labels"][i] = SKIPPED if error else classes.index(class_of[i])
                if error:
                    bar.write(f"skipped {names[i]!r}: {error}")
            bar.update(len(results) * world)
    barrier()
    if rank == 0:
        bad = np.flatnonzero(arrays["labels"] == SKIPPED)
        of = f"with {first[-1]:,} captions" if texts else f"of {len(classes)} classes"
        print(f"{out}: {len(names) - len(bad):,} images {of} at {size} x {size}")
        if len(bad):
            print(f"{len(bad):,} could not be read: {', '.join(repr(names[i]) for i in bad)}")
        if texts:
            encoder.tell_truncated([text for each in texts.values() for text in each])


# ---- 7. Processes, files, models on disk -------------------------------------------------------------------

def brief(error):
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def setup(args):
    """(rank, number of processes, device), in torchrun's process group if there is one; fills in
    args.precision. Raises BadInput."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = args.device or next(d for d in usable if usable[d])
    if not usable[name]:
        raise BadInput(f"--device {name}: this machine, or this build of torch, has none; leave the flag out")
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(name, local) if name == "cuda" else torch.device(name)
    if name == "cuda":
        if local >= torch.cuda.device_count():
            raise BadInput(f"process {local} of this machine has no GPU: start {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=args.timeout))
    args.precision = args.precision or ("bf16" if name == "cuda" else "fp32")
    torch.set_float32_matmul_precision("high")      # TF32, where fp32 would be multiplied
    return rank, int(os.environ.get("WORLD_SIZE", 1)), device


def agreed(asked):
    """Whether any process asks for it. The hosts wait for each other here, but not for their GPUs."""
    if not dist.is_initialized():
        return asked
    flag = torch.tensor(int(asked))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def barrier():
    agreed(False)


@contextlib.contextmanager
def first_on_node():
    """The first process of each node goes ahead, to download what the others then find in the cache."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        barrier()
    yield
    if first:
        barrier()


@contextlib.contextmanager
def exclusive(folder):
    """Keeps other runs out of a run's folder while this one is in it. Raises BadInput where one is."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    with open(folder / "lock", "a+") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)      # a killed process lets go of it
        except (BlockingIOError, PermissionError) as e:
            f.seek(0)
            raise BadInput(f"{folder} is in use by {f.read()}: wait, or name another --exp-name") from e
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}")
        f.flush()
        try:
            yield
        finally:
            if os.listdir(folder) == ["lock"]:      # it never began
                os.unlink(f.name)
                with contextlib.suppress(OSError):      # another run may have begun
                    for p in made:
                        p.rmdir()


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


@contextlib.contextmanager
def stop_signals():
    """Collects SIGTERM, SIGUSR1 (what schedulers send) and a first Ctrl-C; a second Ctrl-C acts at once."""
    caught = []

    def note(number, frame):
        if number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {n: signal.signal(n, note) for n in STOP_SIGNALS}
    try:
        yield caught
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def ignore_stop_signals(worker):
    """Loader processes live on, for the steps until their own process stops."""
    for n in STOP_SIGNALS:
        signal.signal(n, signal.SIG_IGN)


def write_file(path, write):
    """Lets write(f) fill a temporary file, which takes its name once it is whole and on disk, or goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w+b") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException as e:
        part.unlink(missing_ok=True)
        if isinstance(e.__context__, OSError):      # torch.save hides a full disk behind an error of its own
            raise e.__context__
        raise


CHECKSUM = b"\nsha256 "      # and 64 hex digits end a checkpoint; readers of zip files pass over them


def digest(f, size):
    """The SHA-256 of the first `size` bytes of an open file."""
    sha256 = hashlib.sha256()
    f.seek(0)
    while size > 0 and (data := f.read(min(size, 2 ** 20))):
        sha256.update(data)
        size -= len(data)
    return sha256.hexdigest().encode()


def write_checkpoint(path, state):
    def write(f):
        torch.save(state, f)
        f.write(CHECKSUM + digest(f, f.tell()))
    write_file(path, write)


def is_whole(path):
    """Reads a checkpoint through, against its checksum, or, of one that has none (REPA's), zip's own."""
    with open(path, "rb") as f:
        sha256 = digest(f, path.stat().st_size - len(CHECKSUM) - 64)
        end = f.read()
    if end.startswith(CHECKSUM):
        return end == CHECKSUM + sha256
    try:
        return zipfile.ZipFile(path).testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError):
        return False


def newest_checkpoint(folder, rank):
    """The newest whole checkpoint in a folder, or None where there is none at all. Raises BadInput."""
    paths, found = sorted(folder.glob("[0-9]*.pt"), reverse=True), [None]
    for path in paths if rank == 0 else ():
        if is_whole(path):
            found = [path]
            break
        print(f"warning: {path} is torn or damaged: passing over it")
    if dist.is_initialized():
        dist.broadcast_object_list(found, device=torch.device("cpu"))
    if paths and not found[0]:
        raise BadInput(f"{folder} holds no whole checkpoint: to start anew, move it away")
    return found[0]


def write_json(path, value):
    write_file(path, lambda f: f.write(json.dumps(value).encode()))


def read_json(path, *keys):
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise BadInput(f"{path} cannot be read ({brief(e)})") from e
    if missing := [key for key in keys if not isinstance(value, dict) or key not in value]:
        raise BadInput(f"{path} lacks {missing[0]!r}")
    return value


def write_grid(path, images, columns):
    picture = Image.fromarray(make_grid(images, columns, padding=1).permute(1, 2, 0).cpu().numpy())
    write_file(path, lambda f: picture.save(f, "PNG"))


def load_file(path):
    """The dictionary in a .pt file, its `args` (a Namespace in REPA's) made one, too. Raises BadInput."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        args = saved.get("args", {})
    except Exception as e:      # a torn or foreign file can make torch.load raise anything
        raise BadInput(f"{path} cannot be read as a checkpoint ({brief(e)})") from e
    return saved | {"args": args if isinstance(args, dict) else vars(args)}


def look_up(name):
    """(class, patch size, row of MODELS) of a model's name."""
    kind, _, rest = name.partition("-")
    size, _, patch = rest.partition("/")
    return KINDS[kind], int(patch or 2), MODELS[size or kind]


def build_model(name, kind=None, **sizes):
    """The model of that name, or of that kind; sizes are its class's arguments, and go before the table's."""
    named, patch, row = look_up(name)
    table = {"patch_size": patch, "hidden_size": row.width, "depth": row.depth, "num_heads": row.heads,
             "attention_blocks": row.attention_blocks, "feature_block": row.feature_block,
             "projector_dim": row.projector_dim}
    return (kind or named)(**table | sizes)


def load_model(path, name):
    """(EMA model in eval mode, the run's args) of a checkpoint: ours, HASTE's, REPA's, DiT's, or a bare state
    dict. Width, depth and heads are those of the run's model, or of `name`; the input's size and channels,
    classes, projector and text width are read off the weights. Raises BadInput."""
    saved = load_file(path)
    args = saved["args"]
    name = args.get("model", name)
    if args.get("vae") in ("ema", "mse"):       # as DiT's and SiT's trainers say it
        args["vae"] = f"stabilityai/sd-vae-ft-{args['vae']}"
    try:
        state = {k: x for k, x in saved.get("ema", saved).items() if isinstance(x, torch.Tensor)}
        _, channels, patch, _ = state["x_embedder.proj.weight"].shape
        kind, _, _ = look_up(name)
        if len(state["final_layer.linear.bias"]) == 2 * channels * patch ** 2 and kind is not DiT:
            raise ValueError(f"its output has 2 x {channels} channels, as a DiT's: --model DiT-XL/2?")
        args.setdefault("vae", None if channels == 3 else VAE_ENCODER)
        sizes = kind.sizes_in(state, args)
        if kind is not DiT or "projectors.0.0.bias" in state:
            sizes |= {"projector_dim": len(state["projectors.0.0.bias"]),
                      "teacher_dim": len(state["projectors.0.4.bias"])}
        model = build_model(name, input_size=math.isqrt(state["pos_embed"].shape[1]) * patch,
                            in_channels=channels, **sizes)
        if kind is DiT:     # what DiT's authors published was never aligned, and has no projector
            state = {k: x for k, x in model.state_dict().items() if k.startswith("projectors.")} | state
        model.load_state_dict(state)
        if kind is MMDiT:
            model.null_context = saved.get("null_context")
    except (KeyError, RuntimeError, ValueError, AttributeError) as e:
        raise BadInput(f"{path} holds no weights of a {name}: name the right --model ({brief(e)})") from e
    return model.eval(), args


def multiplies_bf16(device):
    """Whether the device has instructions for it: emulated it would be slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(precision, device):
    """A function that opens the autocast of that precision; none for fp32."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return lambda: torch.autocast(device.type, half, enabled=half is not None)


def load_vae(name, device):
    """diffusers' AutoencoderKL, frozen. Raises BadInput where diffusers or the weights are missing."""
    try:
        from diffusers import AutoencoderKL
        return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)
    except ImportError as e:
        raise BadInput("the VAE needs diffusers: pip install diffusers (or --prepare with --vae none)") from e
    except (OSError, ValueError) as e:
        raise BadInput(f"the VAE {name} could not be loaded; --vae takes a folder, too ({brief(e)})") from e


def decoder_of(encoder, given=None):
    """The name of the VAE for what `encoder` encoded, None for pixels. The paper's two are not the same."""
    if given not in (None, "none") and not encoder:
        raise BadInput(f"--vae {given}: the model learned pixels, which need none; leave the flag out")
    if not encoder:
        return None
    return given or (VAE_DECODER if encoder == VAE_ENCODER else encoder)


def load_decoder(encoder, args, device):
    name = decoder_of(encoder, args.vae)
    return load_vae(name, device) if name else None


def to_images(x0, vae=None, scale=1.0):
    """x0 (B, C, S, S) -> uint8 (B, 3, R, R): 255 (x + 1) / 2, clamped and truncated: the paper's protocol."""
    x = x0.float()
    x = torch.cat([vae.decode(part).sample for part in (x / scale).split(16)]) if vae else x
    return (255 * (x + 1) / 2).clamp(0, 255).to(torch.uint8)


# ---- 8. Training -------------------------------------------------------------------------------------------

def settle(args, data, world):
    """Fills in what the model's row and the dataset decide. Raises BadInput for flags that do not fit."""
    kind, patch, row = look_up(args.model)
    args.attention_blocks = args.attention_blocks or row.attention_blocks
    args.teacher_blocks = args.teacher_blocks or row.teacher_blocks
    args.encoder_depth = args.encoder_depth or row.feature_block
    args.num_classes = args.num_classes or len(data.classes)
    args.grid, side = data.shape[1] // patch, data.resolution
    if args.tau is None:
        args.tau = 300_000 if args.model == "SiT-XL/2" and side == 512 else row.tau
    mistakes = {
        f"--batch-size {args.batch_size} does not divide by {world} processes x "
        f"{args.gradient_accumulation_steps} accumulation steps":
            args.batch_size % (world * args.gradient_accumulation_steps),
        f"{args.data_dir} has {len(data)} images, fewer than --batch-size {args.batch_size}":
            len(data) < args.batch_size,
        f"{args.data_dir} has images of {side} x {side}, not of --resolution {args.resolution}":
            args.resolution not in (None, side),
        f"{args.model} cannot cut {data.shape[1]} x {data.shape[2]} into its patches: choose another model":
            data.shape[1] % patch,
        f"{args.data_dir} has the label {data.labels.max()}, too large for --num-classes {args.num_classes}":
            data.labels.max() >= args.num_classes,
        "--attention-blocks and --teacher-blocks must be as many":
            len(args.attention_blocks) != len(args.teacher_blocks),
        "with both weights 0 there is nothing to align: say --tau 0":
            not args.lambda_r and not args.lambda_a and args.tau,
        f"{args.model} learns from captions, and {args.data_dir} has labels: choose another model, or "
        f"--prepare images with captions":
            kind is MMDiT and not data.captions,
        f"{args.data_dir} has captions, not the labels that {args.model} learns from: say --model MMDiT":
            data.captions and kind is not MMDiT,
        f"phase I shows images to the teacher, and {args.data_dir} has none: put them there as images/0.png "
        f"and so on, or say --tau 0":
            data.images is None and args.tau,
    }
    for mistake, made in mistakes.items():
        if made:
            raise BadInput(mistake)
    args.resolution = side


class Learner:
    """The student in training, with its EMA, its optimizer and its loss scaler."""

    def __init__(self, model, args, device):
        self.model, self.net, self.args = model, model, args
        self.ema, self.update_ema = copy.deepcopy(model).eval(), get_ema_multi_avg_fn(args.ema_decay)
        self.ema.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.999),
                                           weight_decay=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        self.autocast = autocast(args.precision, device)
        half = args.precision == "fp32" and multiplies_bf16(device)     # enough for the frozen teacher
        self.teacher_autocast = autocast("bf16", device) if half else self.autocast
        model.grad_checkpoint = args.grad_checkpoint
        if args.compile:
            model.compile(dynamic=False)

    def state_dict(self):
        return {"model": self.model.state_dict(), "ema": self.ema.state_dict(),
                "opt": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def resume(self, saved, path, config):
        """Takes over a checkpoint. Raises BadInput if it is of another model, or of other data."""
        try:
            self.model.load_state_dict(saved["model"])
            self.ema.load_state_dict(saved["ema"])
            groups = self.optimizer.state_dict()["param_groups"]    # this run's rate; REPA's are not fused
            self.optimizer.load_state_dict(saved["opt"] | {"param_groups": groups})
            if saved.get("scaler"):
                self.scaler.load_state_dict(saved["scaler"])
        except (KeyError, RuntimeError, ValueError) as e:
            raise BadInput(
                f"{path} belongs to another model ({saved['args'].get('model')}) than this "
                f"{self.args.model}: choose another --exp-name, or its own flags ({brief(e)})") from e
        for name in ("vae", "scale", "resolution", "text_encoder"):
            if (before := saved["args"].get(name, config[name])) != config[name]:
                raise BadInput(
                    f"{path} learned from data of {name} {before}, where {self.args.data_dir} has {name} "
                    f"{config[name]}: choose another --exp-name, or its own --data-dir")

    def wrap(self, projector):
        """DDP around the model; a projector not in training is frozen: no unused parameter to search for."""
        self.net = None
        gc.collect()        # with an earlier wrapper go its gradient hooks
        self.model.projectors.requires_grad_(projector)
        pairs = [p for p in zip(self.ema.parameters(), self.model.parameters()) if p[1].requires_grad]
        self.followed = [list(x) for x in zip(*pairs)]      # by the EMA
        self.net = self.model if not dist.is_initialized() else DDP(
            self.model, broadcast_buffers=False, gradient_as_bucket_view=True,
            static_graph=self.args.gradient_accumulation_steps == 1)

    def step(self, x0, eps, t, labels, images=None, teacher=None):
        """One step on this process's images. Returns, on the device, (6,): L, L_diff, L_REPA, L_ATTA, the
        gradient's norm, and 1 where that was not finite, and every process left its weights as they were."""
        args, parts, total = self.args, self.args.gradient_accumulation_steps, 0
        shown = images.chunk(parts) if teacher else [None] * parts
        for i, (*part, seen) in enumerate(zip(*(x.chunk(parts) for x in (x0, eps, t, labels)), shown)):
            self.net.require_backward_grad_sync = i + 1 == parts        # DDP's; its no_sync() sets the same
            with self.teacher_autocast():
                target = teacher(seen) if teacher else None
            with self.autocast():
                diff, repa, atta = losses(self.net, *part, target, args.lambda_r, args.lambda_a)
            loss = diff + args.lambda_r * repa + args.lambda_a * atta
            trust = torch.where(loss.detach().isfinite(), 1.0, math.nan)    # told to all by the gradient
            self.scaler.scale(loss * trust / parts).backward()
            total = total + torch.stack([loss, diff, repa, atta]).detach() / parts

        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm or math.inf)
        skipped = (~norm.isfinite()).float()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, skipped     # read on the device
        if skipped.device.type != "mps" or not skipped:     # whose AdamW does not read it
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.update_ema(*self.followed, None)
        return torch.stack([*total, norm, skipped])


class Log:
    """Lines of metrics.jsonl, of TensorBoard and W&B if asked for, by the first process. Raises BadInput."""

    def __init__(self, run, args, step, rank):
        self.path, self.others, self.rank = run / "metrics.jsonl", [], rank
        if rank:
            return
        if self.path.is_file():         # a killed run may have logged beyond its last checkpoint
            lines = [line for line in self.path.read_text().splitlines(True) if line.endswith("}\n")]
            lines = [x for x in lines if json.loads(x)["step"] < step + ("cosine" not in x)]    # asked anew
            write_file(self.path, lambda f: f.write("".join(lines).encode()))
        try:
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                board = SummaryWriter(run / "tensorboard", purge_step=step + 1)
                self.others.append(lambda line: [board.add_scalar(k, x, line["step"]) for k, x in line.items()
                                                 if isinstance(x, (int, float))])
            if args.wandb:
                import wandb
                wandb.init(project=args.wandb, id=args.exp_name, resume="allow", config=vars(args))
                self.others.append(lambda line: wandb.log(line, step=line["step"]))
        except ImportError as e:
            raise BadInput(f"--tensorboard and --wandb need the package of that name ({brief(e)})") from e

    def __call__(self, **line):
        if self.rank:
            return
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")
        except OSError:
            os.truncate(self.path, size)
            raise
        for write in self.others:
            write(line)


def memory_gib(device):
    """The most this process has held: of the GPU's memory, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 2 ** (20 if sys.platform == "linux" else 30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit if resource else 0


MAX_SKIPPED = 50        # steps in a row that were not finite: then the run gives up
MILESTONES = {1000 * k for k in (100, 200, 250, 300, 400, 500, 2000, 2500, 3000)}   # of the paper's tables


def ahead(loader, device):
    """Batches on the device: on CUDA each is copied, from pinned memory, while another is in use."""
    batches, waiting = iter(loader), None
    try:
        if device.type != "cuda":
            yield from ({name: x.to(device) for name, x in batch.items()} for batch in batches)
            return
        stream = torch.cuda.Stream()
        for batch in itertools.chain(batches, [{}]):        # behind the last comes nothing
            torch.cuda.current_stream().wait_stream(stream)     # until what is waiting is there
            with torch.cuda.stream(stream):
                coming = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
            if waiting:
                yield waiting
            waiting = coming
            for x in waiting.values():
                x.record_stream(torch.cuda.current_stream())
    finally:        # at exit, Python would wait for processes that ignore SIGTERM
        getattr(batches, "_shutdown_workers", lambda: None)()


def summarise(window, world):
    """Of a window of what Learner.step returns: the means over the steps that were taken, and of each step
    whether it was skipped."""
    table = torch.stack(window)
    if world > 1:
        dist.all_reduce(table)
    table = (table / world).tolist()        # CPU-GPU sync point
    names = "loss", "loss_diff", "loss_repa", "loss_atta", "grad_norm"
    good = [row for row in table if not row[-1]]
    means = {name: sum(column) / len(good) for name, column in zip(names, zip(*good))}
    return means, [bool(row[-1]) for row in table]


def train(args):
    """Trains args.model on args.data_dir to step args.max_train_steps, from the newest whole checkpoint.

    Returns None, or AGAIN where a signal asked it to stop before. Raises BadInput, and Failure."""
    run = Path(args.output_dir) / args.exp_name
    with exclusive(run), stop_signals() as caught, contextlib.ExitStack() as stack:
        return train_in(run, args, caught, stack)


def train_in(run, args, caught, stack):
    # --- the processes, the data, the run's newest checkpoint
    rank, world, device = setup(args)
    data = Data(args.data_dir)
    settle(args, data, world)
    newest = newest_checkpoint(run / "checkpoints", rank)
    saved = load_file(newest) if newest else None
    step, last = saved["steps"] if saved else 0, args.max_train_steps
    tau = math.inf if args.tau in ("never", "auto") else args.tau
    if args.tau == "auto" and saved and saved["args"].get("tau") == "auto" and saved["tau"] is not None:
        tau = saved["tau"]                          # decided before the interruption: not asked again
    local = args.batch_size // world                # images of each step that this process sees
    rows = slice(rank * local, (rank + 1) * local)  # their places in the global batch

    # --- the teacher, in phase I alone; the student, its EMA, the optimizer
    teacher, teacher_dim = None, len(saved["model"]["projectors.0.4.bias"]) if saved else 768
    if step < min(tau, last):
        with first_on_node():
            blocks = args.teacher_blocks if args.lambda_a else ()
            teacher = load_teacher(args.teacher, args.grid, blocks, args.teacher_repo).to(device)
        teacher_dim = teacher.dim
    torch.manual_seed(args.seed)
    condition = {} if data.captions else {"num_classes": args.num_classes}
    model = build_model(
        args.model, input_size=data.shape[1], in_channels=data.shape[0], class_dropout_prob=args.cfg_prob,
        attention_blocks=args.attention_blocks, feature_block=args.encoder_depth, teacher_dim=teacher_dim,
        **condition).to(device)
    if data.captions:
        model.null_context = data.captions.empty.to(device)
    learner = Learner(model, args, device)
    encoder = data.captions.encoder if data.captions else None
    config = vars(args) | {"vae": data.vae, "scale": data.scale, "text_encoder": encoder}
    if saved:
        learner.resume(saved, newest, config)

    # --- what the first process keeps and shows
    log = Log(run, args, step, rank)
    vae, pictures = None, rank == 0 and args.sampling_steps > 0
    if rank == 0:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{args.model}, {millions:.1f}M parameters, {args.precision} on {world} x {device.type}; "
              f"{len(data):,} images {data.captions or f'of {args.num_classes} classes'}; tau {args.tau}; "
              f"{f'resuming {newest}' if saved else f'starting {run}'}")
        if changed := [k for k, x in (saved["args"].items() if saved else ()) if config.get(k) != x]:
            print(f"warning: not as when that checkpoint was made: {', '.join(changed)}")
    if pictures:
        try:
            vae = load_decoder(data.vae, args, device)
        except BadInput as e:
            pictures = False
            print(f"no grids of samples will be drawn: {e}")
    del saved

    def save():
        state = {"args": config, "steps": step, "tau": None if tau == math.inf else tau}
        state |= {"null_context": model.null_context} if data.captions else {}
        write_checkpoint(run / "checkpoints" / f"{step:07d}.pt", learner.state_dict() | state)
        whole = sorted(p for p in (run / "checkpoints").glob("[0-9]*.pt")
                       if p.stem.isdecimal() and int(p.stem) <= step)       # what lies ahead is damaged
        for path in whole[:-args.keep] if args.keep else ():
            if int(path.stem) not in MILESTONES | {tau}:
                path.unlink()

    def asks(step):
        return args.tau == "auto" and step >= args.tau_from and (step - args.tau_from) % args.tau_every == 0

    window, in_a_row, began = [], 0, time.perf_counter()
    bar = stack.enter_context(tqdm(total=last, initial=step, disable=rank > 0, dynamic_ncols=True))
    while step < last:
        # --- the switch: at tau everything of phase I is dropped at once
        phase_one = step < tau
        teacher = teacher if phase_one else None
        learner.wrap(projector=phase_one and args.lambda_r > 0)
        bar.set_description("phase I" if phase_one else "phase II")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()        # of this phase
        steps = range(step, min(tau, last) if phase_one else last)
        order = requests(len(data), args, rows, steps, want_images=phase_one)
        order = with_picks(order, args, rows, steps) if data.captions else order
        loader = DataLoader(data, batch_size=None, sampler=order, num_workers=args.num_workers,
                            pin_memory=device.type == "cuda", worker_init_fn=ignore_stop_signals)
        for batch in ahead(loader, device):
            # --- the gradient-angle trigger
            if phase_one and asks(step):
                cosines = measure_angles(model, teacher, data, args, step, rank, world, device)
                mean = sum(cosines) / len(cosines)
                log(step=step, cosine=mean, **{f"cosine_t{t}": x for t, x in zip(TRIGGER_TIMES, cosines)})
                if rank == 0:
                    bar.write(f"step {step}: cosine of alignment's and denoising gradient {mean:+.4f}")
                if mean < args.tau_cosine:
                    tau = step
                    break
                began = time.perf_counter()

            # --- the batch; teacher, while step < tau; forward; backward; step; EMA
            t, u, eps, xi = (x[rows] for x in draw(args.batch_size, data.shape, device, args.seed, step))
            x0, labels = data.x0(batch, xi), model.drop(batch["labels"], u)
            window.append(learner.step(x0, eps, t, labels, batch.get("images"), teacher))
            step += 1
            bar.update()

            # --- everything below is diagnostics
            asked = agreed(bool(caught))
            if step % args.log_every == 0 or step in (tau, last) or asked or phase_one and asks(step):
                means, skips = summarise(window, world)
                rate = args.batch_size * len(window) / (time.perf_counter() - began)
                for s in itertools.compress(range(step - len(window), step), skips):
                    indices, _ = next(requests(len(data), args, slice(0, args.batch_size), [s], False))
                    log(step=s + 1, skipped=True, indices=indices.tolist())
                log(step=step, phase=1 if phase_one else 2, **means, skipped_steps=sum(skips),
                    images_per_sec=rate, memory_gib=memory_gib(device))
                bar.set_postfix(loss=means.get("loss", math.nan), images_per_sec=int(rate))
                in_a_row = in_a_row + len(skips) if all(skips) else skips[::-1].index(False)
                if in_a_row >= MAX_SKIPPED:
                    raise Failure(
                        f"the loss or its gradient was not finite in the last {in_a_row} steps, which were "
                        f"skipped: see {log.path} for their images; try --precision bf16 or fp32, or a lower "
                        f"--learning-rate")
                window, began = [], time.perf_counter()
            paused = time.perf_counter()
            if rank == 0 and (step % args.checkpointing_steps == 0 or step in (tau, last) or asked):
                save()
            if asked and step < last:
                by = signal.Signals(caught[0]).name if caught else "another process"
                if rank == 0:
                    bar.write(f"stopped by {by} after step {step}, which is saved: the same command goes on")
                barrier()
                return AGAIN
            if pictures and (step % args.sampling_steps == 0 or step == last):
                with learner.autocast():
                    images = sample_grid(learner.ema, vae, data, args, device)
                write_grid(run / "samples" / f"{step:07d}.png", images, columns=8)
            began += time.perf_counter() - paused       # not counted in images a second
    barrier()


def measure_angles(model, teacher, data, args, step, rank, world, device):
    """gradient_cosine at each of TRIGGER_TIMES, on args.tau_images training images, in fp32."""
    chosen, B = permutation(len(data), args.seed, step, 1)[:args.tau_images], args.batch_size
    micro = B // world // args.gradient_accumulation_steps

    def batches():
        for start in range(0, len(chosen), B):
            _, u, eps, xi = draw(B, data.shape, device, args.seed, step, start + 1)
            mine = range(rank, min(B, len(chosen) - start), world)
            for part in (mine[i:i + micro] for i in range(0, len(mine), micro)):
                batch = {name: x.to(device) for name, x in data[chosen[start:][part], True].items()}
                labels = model.drop(batch["labels"], u[part])
                target = teacher(batch["images"])
                yield len(part) / len(chosen), data.x0(batch, xi[part]), eps[part], labels, target

    with torch.compiler.set_stance("force_eager"):      # a compiled backward cannot be taken twice
        return [gradient_cosine(model, t, batches(), args.lambda_r, args.lambda_a) for t in TRIGGER_TIMES]


# ---- 9. Pictures -------------------------------------------------------------------------------------------

def seeded_noise(model, n, seed, device):
    shape = (n, model.in_channels, model.input_size, model.input_size)
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def sample_grid(ema, vae, data, args, device, n=32):
    """Training's grid (n, 3, R, R): labels, or captions, from the whole range, 50 steps, an ODE if it may be,
    the same noise."""
    if data.captions:
        labels = data[torch.linspace(0, len(data) - 1, n).round().long().numpy(), False]["labels"].to(device)
    else:
        labels = torch.linspace(0, args.num_classes - 1, n, device=device).round().long()
    cfg_scale = args.cfg_scale if args.cfg_prob else 1.0
    noise, mode = seeded_noise(ema, n, args.seed, device), diffusion_of(ema).grid_mode
    torch.manual_seed(args.seed + 1)
    return to_images(sample(ema, noise, labels, steps=50, cfg_scale=cfg_scale, mode=mode), vae, data.scale)


LABELS = 207, 360, 387, 974, 88, 979, 417       # of ImageNet: what --sample draws unless told


def sample_from(args):
    """--sample: a grid of the labels, or captions, asked for, from a checkpoint's EMA, as a PNG."""
    _, _, device = setup(args)
    model, made = load_model(args.sample, args.model)
    if isinstance(model, MMDiT):
        labels = encode_captions(model, made, args, device)
    elif args.captions or args.text_encoder:
        raise BadInput(f"{args.sample} draws labels, not captions: say --labels 207 360, and no more")
    else:
        classes = model.y_embedder.num_classes
        chosen = args.labels or (LABELS if classes == 1000 else range(min(classes, 8)))
        if bad := [y for y in chosen if not 0 <= y < classes]:
            raise BadInput(f"--labels {bad[0]}: its classes are 0 to {classes - 1}")
        labels = torch.tensor(chosen, device=device)
    vae = load_decoder(made["vae"], args, device)
    if args.compile:
        model.compile(dynamic=False)
    noise = seeded_noise(model.to(device), len(labels), args.seed, device)
    guidance = args.guidance_low, args.guidance_high
    torch.manual_seed(args.seed + 1)    # the SDE draws from torch's own stream, and not that noise again
    with autocast(args.precision, device)():
        x = sample(model, noise, labels, args.num_steps, args.cfg_scale, guidance, args.mode, progress=True)
    write_grid(Path(args.out), to_images(x, vae, made.get("scale", VAE_SCALE)), columns=min(8, len(labels)))
    print(f"{args.out}: {len(labels)} samples of {args.sample}, {args.mode} {args.num_steps}, "
          f"guidance {args.cfg_scale}")


# ---- 10. The paper's other backbones: DiT, which learns the noise, and MM-DiT, which reads texts -----------

@functools.lru_cache(maxsize=8)
def ddpm_schedule(steps, device, dtype):
    """`steps` of DiT's 1000 timesteps, evenly spaced, and (6, steps) of them: sqrt abar and sqrt(1 - abar),
    the posterior's weights of x0 and x_t, log beta and log beta~. Raises BadInput."""
    if not 2 <= steps <= 1000:
        raise BadInput(f"DiT is sampled in 2 to 1000 steps, not in {steps}")
    timesteps = np.cumsum([0] + (steps - 1) * [999 / (steps - 1)]).round().astype(int)      # as DiT rounds
    # abar_t = product of 1 - beta up to t; with s, the timestep kept before t, beta = 1 - abar_t / abar_s
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[timesteps]
    abar_s = np.append(1.0, abar[:-1])
    beta = 1 - abar / abar_s
    # q(x_s | x_t, x0) = N((sqrt(abar_s) beta x0 + sqrt(1 - beta) (1 - abar_s) x_t) / (1 - abar_t), beta~)
    # beta~ = beta (1 - abar_s) / (1 - abar_t); at the first timestep 0, without a log: there the second's
    of_x0, of_x_t = abar_s ** 0.5 * beta / (1 - abar), (1 - beta) ** 0.5 * (1 - abar_s) / (1 - abar)
    beta_tilde = beta * (1 - abar_s) / (1 - abar)
    beta_tilde[0] = beta_tilde[1]
    rows = np.stack([abar ** 0.5, (1 - abar) ** 0.5, of_x0, of_x_t, np.log(beta), np.log(beta_tilde)])
    return timesteps.tolist(), torch.tensor(rows, dtype=dtype, device=device)


def ddpm_at(i, x, steps=1000):
    """ddpm_schedule's six at the i-th of its timesteps, for i (B,) each (B, 1, 1, 1)."""
    return ddpm_schedule(steps, x.device, x.dtype)[1][:, i, None, None, None]


# mean = E q(x_s | x_t, (x_t - sqrt(1 - abar) eps) / sqrt(abar)),  log var = f log beta + (1 - f) log beta~
def ddpm_reverse(eps, variance, x_t, i, steps=1000):
    """Mean and log variance of p(x_s | x_t) by the halves of the network's output: eps, and 2 f - 1."""
    signal, noise, of_x0, of_x_t, log_beta, log_beta_tilde = ddpm_at(i, x_t, steps)
    f = (variance + 1) / 2
    return of_x0 * (x_t - noise * eps) / signal + of_x_t * x_t, f * log_beta + (1 - f) * log_beta_tilde


# log P(x) = log(cdf(x + 1/255) - cdf(x - 1/255)), of a level of 256 in [-1, 1], the outermost without end
def level_log_likelihood(x, mean, log_std):
    def cdf(edge):      # of the normal distribution, by the tanh approximation that DiT was trained with
        z = (edge - mean) * torch.exp(-log_std)
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3))) / 2

    above = torch.where(x > 0.999, 1, cdf(x + 1 / 255))
    below = torch.where(x < -0.999, 0, cdf(x - 1 / 255))
    return torch.log((above - below).clamp(min=1e-12))


class DDPM:
    """What DiT learns: the noise, and a variance for the way back; its times are 0 .. 999."""
    modes, grid_mode, max_steps = ("ddpm", "sde", "ode"), "ddpm", 1000

    # x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps
    @staticmethod
    def noised(x0, eps, t):
        t = (1000 * t).floor().clamp(max=999)
        signal, noise, *_ = ddpm_at(t.long(), x0)
        return signal * x0 + noise * eps, t

    # L_diff = mean (eps_hat - eps)^2 + L_vb,    L_vb = KL(q(x_s | x_t, x0) || p(x_s | x_t))
    @staticmethod
    def loss(out, x0, eps, x_t, t):
        """L_vb, in bits a dimension, trains the variance alone: eps_hat is detached in it. At t = 0 it is
        -log p(x0 | x_t), as if x0 were pixels."""
        i, (eps_hat, variance) = t.long(), out.chunk(2, dim=1)
        mean, log_var = ddpm_reverse(eps_hat.detach(), variance, x_t, i)
        _, _, of_x0, of_x_t, _, log_beta_tilde = ddpm_at(i, x0)
        apart = of_x0 * x0 + of_x_t * x_t - mean
        # KL(N(m, v) || N(m', v')) = (v / v' - log(v / v') - 1 + (m - m')^2 / v') / 2
        gap = log_beta_tilde - log_var
        kl = (gap.exp() - gap - 1 + apart ** 2 * (-log_var).exp()) / 2
        nll = -level_log_likelihood(x0, mean, log_var / 2)
        bound = torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl)
        return ((eps_hat - eps) ** 2).mean() + bound.mean() / math.log(2)


def ddpm_sample(network, x, steps, guides, mode, progress=False):
    """From noise x (B, C, S, S) back through `steps` evenly spaced timesteps, nothing clipped.

    "ddpm", DiT's own: ancestral, with the learned variance. "sde": Euler-Maruyama through the score, as the
    paper says. The forward process is dx = -x/2 dtau + dw in the time tau = -log abar, of which each step
    covers the exact share of the discrete schedule. "ode": the probability flow in its exact DDIM form."""
    timesteps, _ = ddpm_schedule(steps, x.device, x.dtype)
    for i in tqdm(range(steps - 1, -1, -1), desc="sampling", disable=not progress):
        eps, variance = network(x, timesteps[i], guides(timesteps[i] / 1000)).chunk(2, dim=1)
        signal, noise, *_ = ddpm_at(i, x, steps)
        signal_s, noise_s = ddpm_at(i - 1, x, steps)[:2] if i else (1.0, 0.0)
        if mode == "ddpm":
            mean, log_var = ddpm_reverse(eps, variance, x, i, steps)
            std = torch.exp(log_var / 2)
        elif mode == "sde":         # dx = -(x / 2 + score) dtau + dw,  score = -eps / sqrt(1 - abar)
            dtau = 2 * torch.log(signal_s / signal)
            mean, std = x + (x / 2 - eps / noise) * dtau, dtau ** 0.5
        else:
            mean, std = signal_s * (x - noise * eps) / signal + noise_s * eps, 0.0
        x = mean + std * torch.randn_like(x) if i and mode != "ode" else mean       # the last takes the mean
    return x


class DiT(SiT):
    """SiT's network and alignment; its times are integers, 0 .. 999, and it says noise and variance,
    (B, 2C, S, S)."""
    outputs, guided, diffusion = 2, 3, DDPM         # DiT guides the first three channels alone


NAMES += [name.replace("SiT", "DiT") for name in NAMES]      # DiT's sizes are SiT's


class JointBlock(nn.Module):
    """One attention over text and image; all else is each one's own. The last block's text ends there."""

    def __init__(self, dim, num_heads, last):
        super().__init__()
        self.context_block, self.x_block = Block(dim, num_heads), Block(dim, num_heads)
        if last:
            del self.context_block.attn.proj, self.context_block.norm2, self.context_block.mlp
            self.context_block.adaLN_modulation[1] = nn.Linear(dim, 2 * dim)

    def forward(self, x, c, text):
        """Image x (B, N, D), c (B, D), text (B, T, D) -> x, its (q, k), and, but for the last block, text."""
        x_a, x_rest = self.x_block.before(x, c)
        text_a, text_rest = self.context_block.before(text, c)
        q, k, v = self.x_block.attn.heads(x_a)                                  # (B, heads, N, head_dim) each
        pairs = zip(self.context_block.attn.heads(text_a), (q, k, v))
        a = attend(*(torch.cat(pair, dim=2) for pair in pairs))                 # (B, T + N, D)
        text_a, x_a = a.split([text.shape[1], x.shape[1]], dim=1)
        x = self.x_block.after(x, self.x_block.attn.proj(x_a), *x_rest)
        if not text_rest:
            return x, (q, k)
        return x, (q, k), self.context_block.after(text, self.context_block.attn.proj(text_a), *text_rest)


class MMDiT(Backbone):
    """The text-to-image MM-DiT with REPA's projector, its parameters named as the released HASTE does.

    Its condition is a text, (B, T, context_dim) as CLIP gives it; time alone modulates. `null_context`
    (T, context_dim), the encoding of "", comes with the data and is no weight of the model's."""

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=768, depth=24, num_heads=24,
                 context_dim=768, class_dropout_prob=0.1, attention_blocks=(4, 5, 6, 7), feature_block=8,
                 teacher_dim=768, projector_dim=2048):
        super().__init__(input_size, patch_size, in_channels, hidden_size, depth, num_heads,
                         attention_blocks, feature_block)
        self.dropout_prob = class_dropout_prob
        self.register_buffer("pos_embed", sincos_positions(hidden_size, input_size // patch_size))
        self.register_buffer("null_context", None, persistent=False)
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.context_embedder = nn.Linear(context_dim, hidden_size)
        self.joint_blocks = nn.ModuleList(
            JointBlock(hidden_size, num_heads, last=i == depth - 1) for i in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * in_channels)
        self.projectors = nn.ModuleList([build_projector(hidden_size, projector_dim, teacher_dim)])

    @property
    def blocks(self):
        return self.joint_blocks

    @property
    def null_label(self):
        if not self.dropout_prob or self.null_context is None:
            raise BadInput("a model trained without text dropout, or without the encoding of the empty text, "
                           "has nothing to guide away from")
        return self.null_context

    @staticmethod
    def sizes_in(state, args):
        return {"context_dim": state["context_embedder.weight"].shape[1],
                "class_dropout_prob": args.get("cfg_prob", 0.1)}

    def drop(self, context, u):
        """Puts the null text where u (B,), uniform in [0, 1), lies below the dropout probability."""
        if not self.dropout_prob:
            return context
        return torch.where(u.view(-1, 1, 1) < self.dropout_prob, self.null_label.to(context.dtype), context)

    def embed(self, x, t, context):
        text = self.context_embedder(context.to(self.context_embedder.weight.dtype))
        return self.x_embedder(x) + self.pos_embed, self.t_embedder(t), text


MODELS["MMDiT"] = Row(24, 768, 24, (4, 5, 6, 7), (8, 9, 10, 11), 8, 2048, 200_000)
NAMES += ["MMDiT", "MMDiT-XS/4"]        # the paper's, and the demo's
KINDS = {"SiT": SiT, "DiT": DiT, "MMDiT": MMDiT}

CLIP, TEXT_WIDTH = "openai/clip-vit-large-patch14", 768


class CLIPText:
    """transformers' CLIP text model, frozen: texts -> their last hidden states (n, 77, 768).

    Raises BadInput where transformers or the weights are missing, or the width is not MM-DiT's."""

    def __init__(self, name, device):
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
            self.tokenizer = CLIPTokenizer.from_pretrained(name)
            model, told = CLIPTextModel.from_pretrained(name, output_loading_info=True)
        except ImportError as e:
            raise BadInput(f"captions need transformers: pip install transformers ({brief(e)})") from e
        except Exception as e:      # a folder of other things can make transformers raise anything
            raise BadInput(f"the text encoder {name} could not be loaded; --text-encoder takes a folder, too "
                           f"({brief(e)})") from e
        if told["missing_keys"]:
            raise BadInput(f"the text encoder {name} holds no weights of a CLIP text model: it lacks "
                           f"{min(told['missing_keys'])}")
        if (width := model.config.hidden_size) != TEXT_WIDTH:
            raise BadInput(f"the text encoder {name} gives {width} numbers a token, where MM-DiT takes "
                           f"{TEXT_WIDTH}: choose another, such as {CLIP}")
        self.model = model.to(device).eval().requires_grad_(False)
        self.length = model.config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, texts):
        ids = self.tokenizer(texts, padding="max_length", max_length=self.length, truncation=True,
                             return_tensors="pt").input_ids
        return self.model(ids.to(self.model.device)).last_hidden_state

    def tell_truncated(self, texts):
        if count := sum(len(ids) > self.length for ids in self.tokenizer(texts, verbose=False).input_ids):
            print(f"{count:,} of {len(texts):,} captions are longer than {self.length} tokens: truncated")


class Words:
    """The demo's stand-in for CLIP: texts -> (n, 12, 768), each word and each place a random vector of its
    own seed, added up."""
    length = 12

    @staticmethod
    @functools.lru_cache(maxsize=None)
    def vector(key):
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
        return torch.randn(TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))

    def __call__(self, texts):
        out = torch.zeros(len(texts), self.length, TEXT_WIDTH)
        for i, text in enumerate(texts):
            for place, word in enumerate(text.split()[:self.length]):
                out[i, place] = self.vector(word) + self.vector(f"place {place}")
        return out

    def tell_truncated(self, texts):
        if count := sum(len(text.split()) > self.length for text in texts):
            print(f"{count:,} of {len(texts):,} captions are longer than {self.length} words: truncated")


def load_text_encoder(name, device):
    return Words() if name == "words" else CLIPText(name, device)


def find_captions(source, given):
    """{image: its captions, at least one} of --prepare's folder: by COCO's JSON where that is given, else by
    a text file beside each image, a caption a line; None if the first images have none. Raises BadInput."""
    names, of = list_images(source, classes=False), {}
    if given:
        where = Path(given[0])
        if len(given) > 1:
            raise BadInput(f"--captions {' '.join(given)}: --prepare takes one file, COCO's JSON")
        coco = read_json(where, "images", "annotations")
        try:
            file = {image["id"]: os.path.basename(image["file_name"]) for image in coco["images"]}
            for annotation in coco["annotations"]:
                of.setdefault(file[annotation["image_id"]], []).append(annotation["caption"])
        except (KeyError, TypeError, AttributeError) as e:
            raise BadInput(f"{where} has not the structure of COCO's captions ({brief(e)})") from e
        of = {name: of.get(os.path.basename(name), []) for name in names}
    else:
        if not any(Path(source, name).with_suffix(".txt").is_file() for name in names[:100]):
            return None         # without a look for ImageNet's million
        beside = {name: Path(source, name).with_suffix(".txt") for name in names}
        where = "a text file beside it"
        try:
            of = {name: path.read_text("utf-8").splitlines() if path.is_file() else []
                  for name, path in beside.items()}
        except (OSError, UnicodeDecodeError) as e:
            raise BadInput(f"--prepare {source}: a caption cannot be read ({brief(e)})") from e
    of = {name: [text.strip() for text in texts if text.strip()] for name, texts in of.items()}
    if without := [name for name, texts in of.items() if not texts]:
        raise BadInput(f"--prepare {source}: {len(without):,} of {len(names):,} images have no caption in "
                       f"{where}, {without[0]} among them")
    return of


class Captions:
    """What a text encoder said of the captions of a dataset's images.

    counts: how many captions each image has; read(i, k): the k-th of image i, encoded, (T, 768); empty
    (T, 768): the encoding of ""; encoder: its name."""

    def __init__(self, counts, read, empty, encoder):
        self.counts, self.read, self.empty, self.encoder = counts, read, torch.tensor(empty), encoder

    def __str__(self):
        return f"with {sum(self.counts):,} captions"

    def encoded(self, slots, picks=None):
        """(B, T, 768) of images: of each its first caption, or where picks (B,) in [0, 1) point."""
        picks = np.zeros(len(slots)) if picks is None else picks
        return np.stack([self.read(i, int(u * self.counts[i])) for i, u in zip(slots, picks)])


def prepared_captions(folder, facts):
    counts = [len(texts) for texts in facts["captions"]]
    first = np.cumsum([0, *counts])
    empty = load_array(folder / "empty_context.npy", "f", None, TEXT_WIDTH)
    contexts = load_array(folder / "contexts.npy", "f", first[-1], len(empty), TEXT_WIDTH)
    return Captions(counts, lambda i, k: contexts[first[i] + k], empty, facts["text_encoder"])


def open_uvit(folder):
    """U-ViT's features of COCO, i.npy: the VAE's mean and log variance, i_k.npy: caption k of image i, and
    empty_context.npy, there or above -> images, from there or from images/, or None; moments; Captions.
    Raises BadInput."""
    def numbered(pattern, *folders):
        return {int(entry.name.split(".")[0]): entry.path for f in folders if f.is_dir()
                for entry in os.scandir(f) if re.fullmatch(pattern, entry.name)}

    def moments(path):
        mean, log_variance = np.split(np.load(path), 2)
        return np.concatenate([mean, np.exp(log_variance.clip(-30, 20) / 2)])        # clamped as the VAE does

    texts = [e.name for e in os.scandir(folder) if re.fullmatch(r"\d+_\d+\.npy", e.name)]
    latents = numbered(r"\d+\.npy", folder)
    pictures = numbered(rf"(?i)\d+({'|'.join(ENDINGS)})".replace(".", r"\."), folder, folder / "images")
    n, counts = len(latents), np.bincount([int(name.split("_")[0]) for name in texts], minlength=len(latents))
    if sorted(latents) != list(range(n)) or len(counts) != n or not counts.all():
        raise BadInput(f"{folder}: its {n} latents must be 0.npy to {n - 1}.npy, each with captions, i_0.npy "
                       f"and so on; look at number {int(np.argmin(counts[:n]))}")
    if pictures and sorted(pictures) != list(range(n)):
        raise BadInput(f"{folder} has {n} latents and {len(pictures)} images: they must be as many, or none")
    home = folder if (folder / "empty_context.npy").is_file() else folder.parent
    hint = "it comes with U-ViT's features"
    empty = load_array(home / "empty_context.npy", "f", None, TEXT_WIDTH, hint=hint)
    load_array(folder / "0_0.npy", "f", len(empty), TEXT_WIDTH, hint=hint)
    captions = Captions(counts, lambda i, k: Files([folder / f"{i}_{k}.npy"], np.load)[0], empty, CLIP)
    images = Files([pictures[i] for i in range(n)], read_image) if pictures else None
    return images, Files([latents[i] for i in range(n)], moments, alike=True), captions


def with_picks(order, args, rows, steps):
    """The requests of these steps, each with what decides which caption of an image is shown."""
    for request, step in zip(order, steps):
        yield *request, np.random.default_rng((args.seed, step, 2)).random(args.batch_size)[rows]


def encode_captions(model, made, args, device):
    """What --sample draws from an MM-DiT: --captions, encoded. Raises BadInput."""
    if args.labels or not args.captions:
        raise BadInput(f'{args.sample} draws captions, not labels: say --captions "a red bus" "a blue K"')
    encoder = load_text_encoder(args.text_encoder or made.get("text_encoder", CLIP), device)
    contexts = encoder(args.captions).to(device)        # those of Words are on the CPU
    if model.null_context is None:      # of a checkpoint that is not ours
        model.null_context = encoder([""])[0].to(device)
    if model.null_context.shape != contexts.shape[1:]:
        raise BadInput(f"the text encoder gives {tuple(contexts.shape[1:])} for a text, where {args.sample} "
                       f"learned from {tuple(model.null_context.shape)}: leave --text-encoder out")
    encoder.tell_truncated(args.captions)
    return contexts


# ---- 11. The command line ----------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float in [low, high]."""
    def value(text):
        try:
            x = kind(text)
        except ValueError:
            x = math.nan
        if not (low <= x <= high and x < math.inf):
            bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            name = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {bounds}")
        return x
    return value


def tau_value(text):
    if text in ("never", "auto"):
        return text
    if text.isascii() and text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps nor `never` nor `auto`")


def parse(argv):
    """The flags, in the dialect of SiT, REPA and HASTE. Raises BadInput."""
    parser = Parser(prog="haste.py", allow_abbrev=False,
                    description="HASTE (arXiv 2505.16792); the same command starts and resumes a run")
    count, weight, share = number(int, 1), number(float, 0), number(float, 0, 1)

    group = parser.add_argument_group("what to do, if not to train").add_mutually_exclusive_group()
    flag = group.add_argument
    flag("--demo", action="store_true", help="all of it, on letters, offline; other flags go to its training")
    flag("--prepare", metavar="SRC", help="turn a tree of class folders into a dataset at --data-dir")
    flag("--sample", metavar="CKPT", help="draw --labels, or --captions, from a checkpoint's EMA")
    flag("--bench", action="store_true", help="time --model: plain, phase I, phase II, and sampling")

    flag = parser.add_argument_group("--demo").add_argument
    flag("--compare", action="store_true", help="plain, REPA, attention and HASTE, side by side, on letters "
         "or on --data-dir")
    flag("--seeds", type=count, metavar="K", help="--compare: as many runs of each, from --seed on [1]")

    flag = parser.add_argument_group("data").add_argument
    flag("--data-dir", help="what --prepare, REPA or U-ViT wrote [data/imagenet256]")
    flag("--resolution", type=count, help="of the images [--prepare: 256; training: the dataset's own]")
    flag("--vae", metavar="NAME_OR_PATH",
         help=f"AutoencoderKL of diffusers, or `none` for pixels [{VAE_ENCODER}; to draw, {VAE_DECODER}]")
    flag("--captions", nargs="+", metavar="TEXT",
         help="--sample: what to draw; --prepare: COCO's JSON, for want of a text file beside each image")
    flag("--text-encoder", metavar="NAME_OR_PATH", help=f"CLIPTextModel of transformers, or `words`, the "
         f"demo's stand-in [{CLIP}; --sample: the dataset's]")
    flag("--num-classes", type=count, help="[the dataset's own]")
    flag("--num-workers", type=number(int, 0), default=min(4, os.cpu_count()), help="a process [%(default)s]")

    flag = parser.add_argument_group("alignment").add_argument
    flag("--model", metavar="NAME", help="{SiT,DiT}-{XS,S,B,L,XL}/{2,4,8} or MMDiT [SiT-XL/2]")
    flag("--teacher", "--enc-type", metavar="NAME", default="dinov2_vitb14",
         help="dinov2_vit{s,b,l,g}14[_reg], timm/NAME, or a file [%(default)s]")
    flag("--teacher-repo", metavar="DIR", help="a clone of facebookresearch/dinov2, for want of internet")
    flag("--tau", "--early-stop-point", type=tau_value, metavar="N|never|auto",
         help="when alignment stops; 0: plain SiT, auto: by the gradient angle [the paper's for the model]")
    flag("--tau-from", type=number(int, 0), default=50_000, help="auto: the first measurement [%(default)s]")
    flag("--tau-every", type=count, default=10_000, help="auto: steps between measurements [%(default)s]")
    flag("--tau-images", type=count, default=2048, help="auto: images in a measurement [%(default)s]")
    flag("--tau-cosine", type=number(float, -1, 1), default=-0.05, help="auto: stop below it [%(default)s]")
    flag("--lambda-r", "--proj-coeff", type=weight, default=0.5, help="weight of L_REPA [%(default)s]")
    flag("--lambda-a", "--attn-coeff", type=weight, default=0.5, help="weight of L_ATTA [%(default)s]")
    flag("--attention-blocks", type=number(int, 0), nargs="+", help="the student's, from 0 [the paper's]")
    flag("--teacher-blocks", type=number(int, 0), nargs="+", help="with them, from 0 of 12 [the paper's]")
    flag("--encoder-depth", type=count, help="the block whose tokens are aligned, from 1 [the paper's]")

    flag = parser.add_argument_group("training").add_argument
    flag("--output-dir", default="runs", help="[%(default)s]")
    flag("--exp-name", help="the run's folder in it [the model's name]")
    flag("--batch-size", type=count, default=256, help="the global batch, over all processes [%(default)s]")
    flag("--gradient-accumulation-steps", type=count, default=1, help="[%(default)s]")
    flag("--max-train-steps", type=count, default=400_000, help="[%(default)s]")
    flag("--learning-rate", type=weight, default=1e-4, help="of AdamW, constant [%(default)s]")
    flag("--max-grad-norm", type=weight, default=1.0, help="0: none [%(default)s]")
    flag("--ema-decay", type=share, default=0.9999, help="[%(default)s]")
    flag("--cfg-prob", type=share, default=0.1, help="label dropout, for guidance [%(default)s]")
    flag("--precision", choices=("bf16", "fp16", "fp32"),
         help="the student's; the teacher's: a half where it is faster [bf16 on CUDA, else fp32]")
    flag("--compile", action="store_true", help="torch.compile the student, or what --sample draws from")
    flag("--grad-checkpoint", action="store_true", help="less memory for more time")
    flag("--device", choices=("cuda", "mps", "cpu"), help="[the best there is]")
    flag("--seed", type=number(int, 0, 2 ** 62), default=0, help="[%(default)s]")
    flag("--log-every", type=count, default=100, help="steps between lines of metrics.jsonl [%(default)s]")
    flag("--checkpointing-steps", type=count, default=50_000, help="steps between checkpoints [%(default)s]")
    flag("--keep", type=count, metavar="N", help="the newest, tau's, and the paper's milestones [all]")
    flag("--timeout", type=count, default=1800, help="seconds to wait for a lost process [%(default)s]")
    flag("--sampling-steps", type=number(int, 0), default=10_000, help="between grids; 0: none [%(default)s]")
    flag("--tensorboard", action="store_true", help="log there, too")
    flag("--wandb", metavar="PROJECT", help="log there, too")

    flag = parser.add_argument_group("--sample").add_argument
    flag("--labels", type=int, nargs="+", help=f"[{' '.join(map(str, LABELS))}, or the first of few]")
    flag("--mode", choices=MODES, default="sde", help="ddpm: DiT's own [%(default)s]")
    flag("--num-steps", type=number(int, 2), default=250, help="[%(default)s]")
    flag("--cfg-scale", type=weight, default=4.0, help="guidance, of grids, too; 1: none [%(default)s]")
    flag("--guidance-low", type=share, default=0.0, help="guide where t is in [low, high] [%(default)s]")
    flag("--guidance-high", type=share, default=1.0, help="[%(default)s]")
    flag("--out", default="samples.png", help="[%(default)s]")
    flag("--json", metavar="FILE", help="--bench: write the figures there, too")

    args = parser.parse_args(argv)
    args.model = args.model or ("SiT" if args.demo else "SiT-XL/2")
    if args.demo and args.model in KINDS:
        args.model = f"{args.model}-XS/4"
    if args.compare and not args.demo or args.seeds and not args.compare:
        raise BadInput("--compare goes with --demo, and --seeds with both: leave them out, or say --demo")
    if args.model not in NAMES:
        raise BadInput(f"unknown model {args.model!r}: choose one of {', '.join(NAMES)}")
    if args.guidance_low > args.guidance_high:
        raise BadInput("--guidance-low lies above --guidance-high: there would be no guidance")
    if (args.captions or args.text_encoder) and not (args.prepare or args.sample):
        raise BadInput("--captions and --text-encoder go with --prepare or --sample: leave them out")
    if args.demo:
        kind, _, _ = args.model.partition("-")
        args.exp_name = args.exp_name or ("compare" if args.compare else f"demo-{kind}".replace("-SiT", ""))
    args.exp_name = args.exp_name or args.model.replace("/", "-")
    args.data_dir = args.data_dir or (None if args.compare else "data/imagenet256")
    return args


@contextlib.contextmanager
def mistakes_told(program):
    """Ends the program with one sentence on what went wrong, and its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (BadInput, Failure, OSError) as e:
        # Mistakes in the flags are the same in every process; one that shows later may be one process's own.
        if os.environ.get("RANK", "0") == "0" or dist.is_initialized():
            told = f"{e}; what was saved before is whole" if isinstance(e, OSError) else str(e)
            print(f"{program}: {told}".replace("\n", " "), file=sys.stderr, flush=True)
        sys.exit(getattr(e, "code", 1))
    except RuntimeError as e:
        if not dist.is_initialized() or not any(x in str(e).lower() for x in ("gloo", "nccl", "connection")):
            raise
        sys.exit(f"{program}: another process of this job died or hangs: its own output may say why, and the "
                 f"same command goes on ({brief(e)})")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    with mistakes_told("haste.py"):
        args = parse(argv)
        if args.demo or args.bench:
            try:
                import evaluate
            except ImportError as e:
                raise BadInput(f"--demo and --bench need evaluate.py beside haste.py: {brief(e)}") from e
            code = evaluate.demo(args, argv) if args.demo else evaluate.bench(args)
        else:
            code = (prepare if args.prepare else sample_from if args.sample else train)(args)
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.modules["haste"] = sys.modules["__main__"]      # evaluate.py imports this module, not a second one
    main()
