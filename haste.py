# SPDX-License-Identifier: MIT
"""HASTE in one file: train diffusion transformers fast by aligning them with DINOv2 early in training.

    REPA Works Until It Doesn't: Early-Stopped, Holistic Alignment Supercharges Diffusion Training
    Wang et al., NeurIPS 2025, https://arxiv.org/abs/2505.16792

    L = L_diff + lambda_R L_REPA + lambda_A L_ATTA    while step < tau     (phase I, holistic alignment)
    L = L_diff                                        while step >= tau    (phase II, no alignment)

    python haste.py --demo                                                # a laptop; needs evaluate.py, too
    python haste.py --model SiT-B/2 --gradient-accumulation-steps 4       # one GPU
    torchrun --nproc_per_node=8 haste.py --model SiT-XL/2 --tau 250000    # eight GPUs: the paper's run

Run the same command again to resume; another experiment needs another --exp-name. Sections 1 to 5 are the
paper, in its order. Section 8 is the training loop. Section 10 holds the paper's two other models; a reader
of SiT can skip it.

    paper     here        shape                  what it is                                        section
    x_0       x0          (B, C, S, S)           a clean sample: a VAE latent, or pixels in [-1, 1]      3
    eps       eps         (B, C, S, S)           the noise, from N(0, 1)                                 3
    t         t           (B,)                   time in [0, 1]: 0 is data, 1 is noise                   3
    x_t       x_t         (B, C, S, S)           (1 - t) x0 + t eps                                      3
    v         v           (B, C, S, S)           the velocity; its target is eps - x0                    3
    proj(h)   z           (B, N, D_T)            the student's tokens after its feature block, projected 1
    y         features    (B, N, D_T)            the teacher's last patch tokens, after its final norm   2
    A^S, A^T  qk          (B, heads, N, d) each  [(q, k), ...], from which the maps are computed      1, 2
              y           (B,)                   the condition: class labels (not the paper's y)         1
              u           (B,)                   uniform in [0, 1): drops the condition if u < cfg_prob  6
              xi          (B, C, S, S)           N(0, 1): draws a latent, mean + std xi                  6
"""
import argparse
import copy
import gc
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from collections import Counter, namedtuple
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache, lru_cache, partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GELUTanh, Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import save_image
from tqdm import tqdm

# Set by torchrun. Some platforms set WORLD_SIZE for a single process; without RANK it means nothing.
DISTRIBUTED = bool(os.environ.get("RANK") and os.environ.get("WORLD_SIZE"))
RANK = int(os.environ["RANK"]) if DISTRIBUTED else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0) if DISTRIBUTED else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if DISTRIBUTED else 1

# To use the CPU of a machine with a GPU, set CUDA_VISIBLE_DEVICES= (to nothing).
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")


class UserError(Exception):
    """A user error or a fault of the machine, printed as one sentence."""


@contextmanager
def user_error(sentence):
    """Re-raises any exception as a UserError that begins with `sentence`."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{sentence} ({reason(e)})") from e


def reason(error):
    """What went wrong, in a line: an exception's type and message, without other text around it."""
    # torch.save reports a full disk by an error of its own, raised from the OSError that says so.
    if isinstance(error.__context__, OSError):
        error = error.__context__
    # A loader process puts its traceback before the message, and torch.load its advice.
    message = re.split(r"\n[\w.]+: |trusted source\.\s|WeightsUnpickler error: ", str(error))[-1]
    message = " ".join(message.split())
    return f"{type(error).__name__}: {message[:300]}"


# ---- 1. The student: SiT -----------------------------------------------------------------------------------

# The paper's models: sizes, the blocks that are aligned, their partners in the teacher, and tau. Attention
# and teacher blocks count from 0, in a teacher of 12 blocks; the feature block counts from 1. At 512 px, the
# tau of SiT-XL/2 is 300,000. XS, for the demo, and S are not in the paper.
Config = namedtuple("Config", "depth hidden_size num_heads attention_blocks feature_block projector_dim "
                              "teacher_blocks tau")
CONFIGS = {
    #             depth width heads attention     feature projector teacher          tau
    "XS": Config(     6,  128,    4, (1, 2, 3),         4,      256, (9, 10, 11),    450),
    "S": Config(     12,  384,    6, (2, 3, 4),         5,     2048, (7, 9, 11), 100_000),
    "B": Config(     12,  768,   12, (2, 3, 4),         5,     2048, (7, 9, 11), 100_000),
    "L": Config(     24, 1024,   16, (4, 5, 6, 7),      8,     2048, (8, 9, 10, 11), 250_000),
    "XL": Config(    28, 1152,   16, (4, 5, 6, 7),      8,     2048, (8, 9, 10, 11), 250_000),
    "MMDiT": Config( 24,  768,   24, (4, 5, 6, 7),      8,     2048, (8, 9, 10, 11), 200_000),
}
# Blocks scale and shift by adaLN, so that their norms have no weights of their own.
LayerNorm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)


def split_heads(qkv, heads):
    """(B, N, 3 D) -> q, k, v of A = softmax(q k^T / sqrt(d)), each (B, heads, N, d), as views."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).unbind(2)        # (B, N, heads, d)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Attention(nn.Module):
    """Self-attention that also returns its queries and keys, for L_ATTA."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)     # (B, heads, N, head_dim)
        x = x.transpose(1, 2).flatten(2)                # (B, N, D)
        return self.proj(x), (q, k)


def modulate(x, shift, scale):
    """adaLN: scales and shifts tokens x (B, N, D) by (B, D) (Peebles and Xie, section 3.2)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (Peebles and Xie, 2023, section 3.2)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        """Tokens x (B, N, D) and condition c (B, D) -> the next tokens, and (q, k) of the attention."""
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        attended, qk = self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_msa[:, None] * attended
        x = x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x, qk


class FinalLayer(nn.Module):
    """Tokens (B, N, D), condition (B, D) -> patches (B, N, out_features) (Peebles and Xie, section 3.2)."""

    def __init__(self, dim, out_features):
        super().__init__()
        self.norm_final = LayerNorm(dim)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def frequencies(device=None):
    """128 frequencies from 1 to nearly 1/10,000, for the timestep embedding (Vaswani et al., section 3.5)."""
    return torch.exp(-math.log(10000) / 128 * torch.arange(128, device=device))


class TimestepEmbedder(nn.Module):
    """Times t (B,) -> (B, D): an MLP of sines and cosines (Peebles and Xie, section 3.2)."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        angles = t.float()[:, None] * frequencies(t.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """Class labels y (B,) -> (B, D). The last row is the null label, for guidance (Ho and Salimans, 2021)."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):
        return self.embedding_table(y)


def sincos_positions(dim, side):
    """Fixed positions (1, side^2, dim): sines and cosines of the column, then of the row (Vaswani et al.)."""
    # A quarter of the width for each of sine and cosine, of column and row.
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.outer(torch.arange(side, dtype=torch.float64), omega)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1).float()      # (side, dim / 2)
    column = waves.repeat(side, 1)
    row = waves.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1)[None]


def unpatchify(x, patch):
    """Tokens (B, N, patch^2 C) -> (B, C, S, S), the reverse of patches (Peebles and Xie, section 3.2)."""
    side = math.isqrt(x.shape[1])
    # h and w count the patches; p and q are the rows and columns within one.
    x = x.view(len(x), side, side, patch, patch, -1)
    x = torch.einsum("bhwpqc->bchpwq", x)
    return x.reshape(len(x), -1, side * patch, side * patch)


def build_projector(dim, projector_dim, teacher_dim):
    """proj of L_REPA, as in REPA: tokens (B, N, D) -> (B, N, teacher_dim)."""
    # A random stream of its own keeps the other initial weights independent of teacher_dim.
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(torch.initial_seed() + 1)
        return nn.Sequential(
            nn.Linear(dim, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, teacher_dim))


def xavier(module):
    """SiT's initial weights of a linear layer, or of the patch embedding, which is linear on each patch."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """SiT, the scalable interpolant transformer, with REPA's projector; parameters are named as in both.

    attention_blocks count from 0, feature_block from 1. Label dropout is part of the training loop.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 num_classes=1000, attention_blocks=(4, 5, 6, 7), feature_block=8,
                 teacher_dim=768, projector_dim=2048, out_channels=None):
        super().__init__()
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.attention_blocks = attention_blocks
        self.feature_block = feature_block
        self.diffusion = Flow()                 # section 3
        # Guidance acts on the first guided_channels. Trained without label dropout, a model cannot be guided.
        self.guided_channels = in_channels
        self.can_be_guided = True

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        positions = sincos_positions(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.projectors = nn.ModuleList([build_projector(hidden_size, projector_dim, teacher_dim)])
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * (out_channels or in_channels))
        self.initialize_weights()

    def initialize_weights(self):
        for part in (self.x_embedder, self.t_embedder, self.blocks, self.final_layer):
            part.apply(xavier)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # adaLN-Zero: each block starts as the identity, and the model as v = 0.
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        self.projectors.apply(xavier)

    def forward(self, x, t, y, align=False):
        """x (B, C, S, S), t (B,), y (B,) -> v (B, C, S, S).

        With align: v, z (B, N, teacher_dim), [(q, k), ...] of attention_blocks, (B, heads, N, head_dim) each.
        """
        x = self.x_embedder(x) + self.pos_embed         # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)     # (B, D)
        states = []
        for block in self.blocks:
            x, qk = block(x, c)
            if align:
                # References only: the backward pass keeps these tensors anyway.
                states.append((x, qk))
        return self.outputs(x, c, states)

    def outputs(self, x, c, states):
        """Tokens x after the last block, c, and with align the tokens and (q, k) after each block -> as
        forward."""
        v = unpatchify(self.final_layer(x, c), self.patch_size)
        if not states:
            return v
        h, _ = states[self.feature_block - 1]
        z = self.projectors[0](h)
        return v, z, [states[i][1] for i in self.attention_blocks]

    def null_condition(self, y):
        """The null label in the shape of y, for unconditional samples (Ho and Salimans, 2021)."""
        return torch.full_like(y, self.num_classes)


# ---- 2. The teacher: DINOv2, frozen ------------------------------------------------------------------------

DINOV2_REPO = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"


class Teacher(nn.Module):
    """A frozen ViT that returns its patch tokens and the queries and keys of some blocks (y and A^T).

    vit: DINOv2 of torch.hub, or a timm VisionTransformer; blocks count from 0. grid: the student's tokens on
    a side, to which images and position embeddings are resampled. mean, std: of its images, in [0, 1].
    """

    def __init__(self, vit, blocks, grid, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
        super().__init__()
        self.blocks = blocks
        self.grid = grid
        self.dim = vit.embed_dim
        self.size = grid * vit.patch_embed.patch_size[0]
        for name, x in (("mean", mean), ("std", std)):
            x = torch.as_tensor(x, dtype=torch.float32).view(3, 1, 1)
            if not ((0 <= x) & (x <= 1)).all() or (name == "std" and x.min() == 0):
                raise ValueError(f"the {name} of its images, which are in [0, 1], is {x.flatten().tolist()}")
            self.register_buffer(name, 255 * x, persistent=False)

        # Positions are resampled once. Those of class and register tokens, if they have any, come first.
        prefix = vit.pos_embed.shape[1] - vit.patch_embed.num_patches
        vit.pos_embed.data = resample_abs_pos_embed(
            vit.pos_embed.data, [grid, grid], num_prefix_tokens=prefix)
        # timm compares this with the input's grid, and then skips its own resampling.
        vit.patch_embed.grid_size = (grid, grid)
        self.vit = vit.eval().requires_grad_(False)

        # DINOv2's attention does not return its maps, and a fused kernel never forms them.
        # Hooks keep the output of qkv, so that the hub's code stays as it is.
        self.qkv = {}
        for b in set(blocks):
            vit.blocks[b].attn.qkv.register_forward_hook(partial(self.keep, b))

    def keep(self, b, module, args, output):
        self.qkv[b] = output

    @torch.no_grad()
    def forward(self, images):
        """images (B, 3, H, W) uint8 -> features (B, N, dim), [(q, k), ...] as the student's."""
        x = (images - self.mean) / self.std
        x = F.interpolate(x, self.size, mode="bicubic")
        features = self.vit.forward_features(x)
        # The hub's DINOv2 returns a dictionary.
        if isinstance(features, dict):
            features = features["x_norm_patchtokens"]
        # The last N tokens are the patches; class and register tokens come before them. To cut these from q
        # and k is to cut their rows and columns from the logits, so that the maps are of the patches alone.
        N = self.grid ** 2
        qk = []
        for b in self.blocks:
            attn = self.vit.blocks[b].attn
            q, k, _ = split_heads(self.qkv[b][:, -N:], attn.num_heads)
            # In timm's ViTs, q and k may have norms of their own.
            if hasattr(attn, "q_norm"):
                q, k = attn.q_norm(q), attn.k_norm(k)
            qk.append((q, k))
        self.qkv.clear()
        return features[:, -N:], qk


def load_teacher(name, grid, blocks):
    """The Teacher called `name`: a DINOv2 of torch.hub (the paper's is dinov2_vitb14), or a file {"config",
    "model"} with the arguments and weights of a timm VisionTransformer, and its "mean" and "std" if they are
    not ImageNet's.

    blocks are those of a ViT of 12 blocks, from 0 to 11; in a teacher of another depth the indices are
    shifted to keep their distance from the last block. Raises UserError.
    """
    normalisation = {}
    if re.fullmatch("dinov2_vit[sblg]14(_reg)?", name):
        advice = (f"without internet, copy {torch.hub.get_dir()} from a machine that has loaded it, or use "
                  f"--teacher FILE")
        with user_error(f"--teacher {name} could not be loaded from torch.hub: {advice}"):
            vit = torch.hub.load(DINOV2_REPO, name, trust_repo=True, skip_validation=True)
    else:
        advice = 'a file holds {"config": {...}, "model": weights} of a timm VisionTransformer'
        with user_error(f"--teacher {name} is neither dinov2_vit[s,b,l,g]14[_reg] nor a file that can be "
                        f"read; {advice}"):
            saved = torch.load(name, map_location="cpu", weights_only=True)
            vit = VisionTransformer(**saved["config"] | {"dynamic_img_size": True})
            vit.load_state_dict(clean_weights(saved["model"]))
            if len(set(vit.patch_embed.grid_size)) > 1 or vit.patch_embed.proj.in_channels != 3:
                raise ValueError("its images must be square and have three channels")
            check_finite(saved["model"], name)
            normalisation = {key: saved[key] for key in ("mean", "std") if key in saved}

    shift = len(vit.blocks) - 12
    for b in blocks:
        if not 0 <= b + shift < len(vit.blocks):
            raise UserError(f"--teacher-blocks {b}: there is no such block among the last 12 of {name}, "
                            f"which has {len(vit.blocks)}; choose from {max(0, -shift)} to 11")
    for block in vit.blocks:
        if type(block.attn).__name__ not in ("Attention", "MemEffAttention"):
            raise UserError(f"--teacher {name} has blocks with {type(block.attn).__name__}, whose maps are "
                            f"not softmax(q k^T): use another teacher")
    with user_error(f"--teacher {name} cannot be used"):
        return Teacher(vit, [b + shift for b in blocks], grid, **normalisation)


# ---- 3. Diffusion: the flow that SiT learns, and its samplers ----------------------------------------------

class Flow:
    """The linear interpolant from data to noise, and its velocity (the SiT paper, section 2)."""

    modes = ("sde", "ode", "heun")
    step_range = (1, math.inf)

    # x_t = (1 - t) x0 + t eps
    def add_noise(self, x0, eps, t):
        """x0, eps (B, C, S, S), t (B,) in [0, 1] -> x_t, and t in the model's own units."""
        s = t.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * eps, t

    # L_diff = mean (v(x_t, t) - (eps - x0))^2
    def loss(self, v, x0, eps, x_t, t):
        """v, x0, eps (B, C, S, S) -> L_diff, a scalar. x_t and t are for models that learn something else."""
        return ((v - (eps - x0)) ** 2).mean()

    # ODE:  dx = v dt
    # SDE:  dx = (v - w score / 2) dt + sqrt(w) dW  with w = 2 t and score = -(x + (1 - t) v) / t
    def integrate(self, network, x, steps, mode):
        """Integrates v = network(x, t, t_guide) from x (B, C, S, S) at t = 1 to 0. Paper: SDE, 250 steps."""
        if mode == "sde":
            times = torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist() + [0.0]
        else:
            times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        for i in tqdm(range(steps), desc="sampling", disable=RANK > 0, leave=False):
            t = times[i]
            t_next = times[i + 1]
            dt = t_next - t
            # Whether an evaluation is guided is decided by the time at which the step begins.
            v = network(x, t, t_guide=t)
            if mode == "sde":
                w = 2 * t
                score = -(x + (1 - t) * v) / t
                x = x + (v - 0.5 * w * score) * dt
                # There is no noise in the last step.
                if t_next > 0:
                    x = x + math.sqrt(w * -dt) * torch.randn_like(x)
            elif mode == "heun" and t_next > 0:
                v_next = network(x + v * dt, t_next, t_guide=t)
                x = x + 0.5 * (v + v_next) * dt
            else:
                x = x + v * dt
        return x


def check_sampler(model, steps, cfg_scale, guidance, mode):
    """Raises UserError if `model` cannot be sampled in this way. The paper: SDE, 250 steps."""
    diffusion = model.diffusion
    low, high = diffusion.step_range
    if mode not in diffusion.modes:
        raise UserError(f"this model has no sampler {mode}: use --mode {' or '.join(diffusion.modes)}")
    if not low <= steps <= high:
        raise UserError(f"--num-steps {steps}: this model takes from {low} to {high} steps")
    if not 0 <= guidance[0] <= guidance[1] <= 1:
        raise UserError(f"guidance between {guidance[0]} and {guidance[1]}: use 0 <= --guidance-low <= "
                        f"--guidance-high <= 1")
    if cfg_scale != 1 and not model.can_be_guided:
        raise UserError("a model trained without label dropout cannot be guided: use --cfg-scale 1")


@torch.no_grad()
def sample(model, noise, y, steps=250, cfg_scale=1.0, guidance=(0.0, 1.0), mode="sde"):
    """noise (B, C, S, S) and conditions y, such as labels (B,) -> samples (B, C, S, S), in fp64.

    "sde" is the paper's: Euler-Maruyama with `steps` evaluations, t from 1 to 0.04, and then the mean at 0.
    "ode" is Euler's method, "heun" is Heun's with 2 * steps - 1 evaluations. Guidance acts in the steps that
    begin at a t in the interval `guidance`.
    Raises UserError for a sampler that the model does not have, and for samples that are not finite.
    """
    check_sampler(model, steps, cfg_scale, guidance, mode)
    low, high = guidance
    y_null = model.null_condition(y) if cfg_scale != 1 else None
    guided = model.guided_channels

    # v = v_null + cfg_scale (v_y - v_null)
    def guided_network(x, t, t_guide):
        x = x.to(noise.dtype)
        t = noise.new_full((len(x),), t)
        if cfg_scale == 1 or not low <= t_guide <= high:
            return model(x, t, y).double()
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y_null]))
        v, v_null = both.double().chunk(2)
        v[:, :guided] = v_null[:, :guided] + cfg_scale * (v[:, :guided] - v_null[:, :guided])
        return v

    x = model.diffusion.integrate(guided_network, noise.double(), steps, mode)
    if not x.isfinite().all():
        raise UserError("the samples are not finite: the weights are bad, or --precision fp16 overflowed")
    return x


# ---- 4. Alignment: the two losses --------------------------------------------------------------------------

# L_REPA = - mean over images and tokens of cos(proj(h), y)
def feature_loss(z, features):
    """z = proj(h) and the teacher's features, (B, N, D_T) each -> L_REPA, a scalar in [-1, 1].

    In fp32: normalising in fp16 gives NaN.
    """
    return -F.cosine_similarity(z.float(), features.float(), dim=-1).mean()


# L_ATTA = - mean over pairs of blocks, images, heads and rows i of sum_j A^T_ij log A^S_ij,
# with the attention maps A = softmax(q k^T / sqrt(head_dim))
def attention_loss(student_qk, teacher_qk):
    """Two lists with a pair (q, k) for each block, (B, heads, N, head_dim) each -> L_ATTA, a scalar, in fp32.

    As in the paper, student head i is paired with teacher head i, for the first 12 heads: its teacher, a
    ViT-B, has no more. The others are not aligned, even if a larger teacher has them, too.
    """
    def pair_loss(q, k, q_t, k_t):
        heads = min(q.shape[1], q_t.shape[1], 12)
        q, k, q_t, k_t = [x[:, :heads].float() for x in (q, k, q_t, k_t)]
        with torch.autocast(q.device.type, enabled=False):
            logits = q @ k.mT / q.shape[-1] ** 0.5                  # (B, heads, N, N)
            maps = (q_t @ k_t.mT / q_t.shape[-1] ** 0.5).softmax(dim=-1)
            return F.cross_entropy(logits.flatten(0, 2), maps.flatten(0, 2))

    # Checkpointing each pair of blocks keeps the maps of only one pair in memory at a time.
    pair_losses = [torch.utils.checkpoint.checkpoint(pair_loss, *student, *teacher, use_reentrant=False)
                   for student, teacher in zip(student_qk, teacher_qk, strict=True)]
    return torch.stack(pair_losses).mean()


# target: the teacher's (features, qk) for the same images; None in phase II.
Batch = namedtuple("Batch", "x0 eps t y target")


def losses(net, diffusion, x0, eps, t, y, target, lambda_r, lambda_a):
    """A batch -> L_diff, L_REPA and L_ATTA, scalars, not yet weighted (section 3 of the paper).

    A loss whose weight is 0 is not computed, and is returned as 0.
    """
    x_t, t = diffusion.add_noise(x0, eps, t)
    repa = x0.new_zeros(())
    atta = x0.new_zeros(())
    # Phase I also projects tokens and forms attention maps; phase II does neither.
    if target is None:
        v = net(x_t, t, y)
    else:
        features, teacher_qk = target
        v, z, student_qk = net(x_t, t, y, align=True)
        if lambda_r > 0:
            repa = feature_loss(z, features)
        if lambda_a > 0:
            atta = attention_loss(student_qk, teacher_qk)
    return diffusion.loss(v.float(), x0, eps, x_t, t), repa, atta


# ---- 5. Termination: the gradient-angle trigger of appendix A.2 --------------------------------------------

# From step --tau-from on, and then every --tau-every steps, the gradients of the two parts of the objective
# are compared on --tau-images images at these times. Alignment ends at the first measurement whose mean
# cosine is below --tau-cosine: then the teacher begins to work against the diffusion loss.
TRIGGER_TIMES = (0.02, 0.1, 0.5, 0.8)


def trigger_is_due(step, args):
    """True if the gradients are to be compared before this step (appendix A.2)."""
    return args.tau == "auto" and step >= args.tau_from and (step - args.tau_from) % args.tau_every == 0


# grad (lambda_R L_REPA + lambda_A L_ATTA) and grad L_diff
def gradients(model, batch, lambda_r, lambda_a):
    """The two gradients of a Batch, for the P parameters of the feature block: (2, P) (appendix A.2)."""
    parameters = list(model.blocks[model.feature_block - 1].parameters())
    diff, repa, atta = losses(model, model.diffusion, *batch, lambda_r, lambda_a)
    align = lambda_r * repa + lambda_a * atta
    # A parameter that a loss does not reach has the gradient 0.
    of_align = torch.autograd.grad(align, parameters, retain_graph=True, materialize_grads=True)
    of_diff = torch.autograd.grad(diff, parameters, materialize_grads=True)
    flat = [nn.utils.parameters_to_vector(gradient) for gradient in (of_align, of_diff)]
    return torch.stack(flat)


def measure_cosines(model, teacher, data, args, step, size):
    """The cosine of the two gradients at each of TRIGGER_TIMES (appendix A.2), `size` images at a time.

    The paper does not say how images are averaged; here the gradients are those of the mean losses.
    """
    # The 1 keeps these random numbers apart from those of the step itself.
    chosen = permutation(len(data), args.seed, step, 1)[:args.tau_images]
    _, u, eps, xi = randomness(len(chosen), data.shape, args.seed, step, 1)
    # Each process takes its share of the images.
    mine = range(RANK, len(chosen), WORLD_SIZE)
    P = sum(p.numel() for p in model.blocks[model.feature_block - 1].parameters())
    total = torch.zeros(len(TRIGGER_TIMES), 2, P, device=DEVICE)
    for start in range(0, len(mine), size):
        i = list(mine[start:start + size])
        items = to_device(default_collate([data[j] for j in chosen[i].tolist()]))
        x0 = data.x0(items, xi[i])
        y = data.condition(items, u[i], args.cfg_prob)
        target = teacher(items["image"])
        for k, t in enumerate(TRIGGER_TIMES):
            batch = Batch(x0, eps[i], x0.new_full((len(i),), t), y, target)
            total[k] += len(i) * gradients(model, batch, args.lambda_r, args.lambda_a)
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    return F.cosine_similarity(total[:, 0], total[:, 1], dim=1).tolist()


def trigger_fires(cosines, args):
    """True if alignment ends here: on average, the two gradients point apart (appendix A.2)."""
    return sum(cosines) / len(cosines) < args.tau_cosine


# ---- 6. Data: images and their latents ---------------------------------------------------------------------

# A dataset has the layout of REPA's preprocessing. --prepare adds "classes", "vae", ... to the JSON.
#   images/00000/img00000000.png              a cropped image
#   images/dataset.json                       {"labels": [[name, label], ...]}
#   vae-sd/00000/img-mean-std-00000000.npy    mean and std of its latent, (2C, S, S) fp32; not for pixels
#   vae-sd/dataset.json                       as that of the images, for the latents
# dataset.json is written last, so that a folder without one is not complete.
PNG = "images/{:05d}/img{:08d}.png"
NPY = "vae-sd/{:05d}/img-mean-std-{:08d}.npy"
VAE_ENCODER = "stabilityai/sd-vae-ft-mse"
VAE_DECODER = "stabilityai/sd-vae-ft-ema"
VAE_SCALE = 0.18215


def is_hidden(name):
    """True for names of files and folders that are never classes or images."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "lost+found")


def list_images(folder):
    """Sorted relative paths of the images below a folder, and of its other files; links are followed."""
    images = []
    others = []
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        # A link can lead to a folder above it.
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not is_hidden(name)]
        below = Path(root).relative_to(folder)
        for name in files:
            if is_hidden(name):
                continue
            path = (below / name).as_posix()
            if name.lower().endswith(IMG_EXTENSIONS):
                images.append(path)
            else:
                others.append(path)
    return sorted(images), sorted(others)


def to_rgb(image):
    """A PIL image -> RGB of 8 bits, turned by its EXIF orientation. Raises UserError for unknown levels."""
    # Damaged EXIF data can raise any exception, while the pixels are intact.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen_bits:
        levels = np.asarray(image) // 256
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UserError(f"the levels of mode {image.mode} have no known range: convert the image to 8 bits")
    return image.convert("RGB")


def to_tensor(image):
    """A PIL image in RGB -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def center_crop(image, size):
    """ADM's crop of a PIL image: halve with BOX while possible, then BICUBIC, then cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(scale * image.width), round(scale * image.height)), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_labels(path):
    """A dataset.json -> its names, sorted, their labels, int64, and all that it holds. Raises UserError."""
    metadata = read_json(path)
    with user_error(f"{path}: the labels are not a list of [name, whole number]"):
        labels = dict(metadata["labels"])
        if not labels:
            raise ValueError("there are none")
        if len(labels) < len(metadata["labels"]):
            raise ValueError("a name occurs twice")
        names = sorted(labels)
        # Labels may be numbers, their text, or true and false.
        values = np.array([labels[name] for name in names], dtype=np.float64)
        if values.ndim > 1:
            raise ValueError("a label is a list")
        # More than a million classes are the numbers of something else, such as WordNet's.
        wrong = np.flatnonzero((values < 0) | (values % 1 != 0) | (values > 1_000_000))
        if len(wrong):
            name = names[wrong[0]]
            raise ValueError(f"the label of {name} is {labels[name]}")
    return np.array(names), values.astype(np.int64), metadata


class Data(Dataset):
    """A prepared dataset: data[i] is {"index", "y", "moments" (2C, S, S), "image" (3, R, R) uint8}.

    The image is there if with_images is set, as the training loop does in phase I, or if the model learns
    pixels. A dataset of another layout needs this, x0() and condition(), and these: shape, (C, S, S) of x0;
    names, of the items; classes, their names; trained_labels, those that occur; captions, {name: texts} or
    None; images and latents, two folders; vae and scale of the latents; digest, which tells datasets apart.
    For pixels, latents and vae are None, and scale is 1. Raises UserError.
    """

    def __init__(self, folder):
        self.images = Path(folder, "images")
        self.latents = Path(folder, "vae-sd")
        if not self.latents.is_dir():
            # Without latents, the model learns pixels.
            self.latents = None
        root = self.latents or self.images
        if not (root / "dataset.json").is_file():
            if self.latents:
                raise UserError(f"{root} has no dataset.json, so it is not complete: run --prepare again")
            raise UserError(f"{folder} is not a prepared dataset: make one with --prepare IMAGES "
                            f"--data-dir NEW_FOLDER")
        self.names, self.labels, metadata = read_labels(root / "dataset.json")
        self.image_names = self.find_image_names(metadata)
        self.digest = hashlib.sha1(self.names.tobytes() + self.labels.tobytes()).hexdigest()

        # The labels that occur, and the names of all classes up to the largest.
        self.trained_labels = np.unique(self.labels).tolist()
        self.classes = metadata.get("classes") or [str(i) for i in range(self.labels.max() + 1)]
        if not isinstance(self.classes, list):
            raise UserError(f"{root}/dataset.json: the classes must be a list of their names")
        if self.labels.max() >= len(self.classes):
            raise UserError(f"{root}/dataset.json has the label {self.labels.max()}, "
                            f"but only {len(self.classes)} classes: name all of them")
        self.captions = metadata.get("captions")
        if self.captions:
            for name in self.names:
                texts = self.captions.get(name)
                if not texts or not all(isinstance(text, str) for text in texts) or isinstance(texts, str):
                    raise UserError(f"{root}/dataset.json: the captions of {name} must be a list of texts")

        # The VAE that made the latents; REPA's listings do not name it.
        self.vae = VAE_ENCODER if self.latents else None
        self.scale = VAE_SCALE if self.latents else 1.0
        if self.latents and "vae" in metadata:
            self.vae = metadata["vae"]
            self.scale = metadata.get("scale")
            if not isinstance(self.scale, (int, float)) or not 0 < self.scale < math.inf:
                raise UserError(f"{root}/dataset.json: the scale of latents must be a number above 0, "
                                f"not {self.scale}")

        # Reading the first item, with its image if there is one, records the shapes that all must have.
        self.shapes = {}
        self.with_images = (self.images / self.image_name(0)).is_file()
        first = self[0]
        self.with_images = False
        channels, *size = first["moments" if self.latents else "image"].shape
        # The shape of a clean sample x0.
        self.shape = (channels // 2 if self.latents else channels, *size)
        if self.vae == VAE_ENCODER and channels != 8:
            raise UserError(f'{root}/dataset.json does not name a VAE of {channels // 2} channels: '
                            f'add "vae" and "scale"')

    def find_image_names(self, metadata):
        """The names of the images, or None if they are as those of the latents."""
        if not self.latents:
            return self.names
        # --prepare gives an image and its latent one number. REPA's encode counts anew; then both listings
        # are in the same order, and so are the labels.
        listing = self.images / "dataset.json"
        if "vae" not in metadata and listing.is_file():
            names, labels, _ = read_labels(listing)
            if np.array_equal(labels, self.labels):
                return names
        return None

    def image_name(self, i):
        if self.image_names is not None:
            return self.image_names[i]
        return self.names[i].replace("img-mean-std-", "img").replace(".npy", ".png")

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        item = {"index": i, "y": self.labels[i]}
        if self.latents:
            path = self.latents / self.names[i]
            with user_error(f"{path} cannot be read"):
                # Some tools store a batch of one.
                moments = torch.from_numpy(np.load(path).astype(np.float32)).squeeze(0)
            if not moments.isfinite().all():
                raise UserError(f"{path} holds values that are not finite: encode it again")
            item["moments"] = self.check_shape("moments", path, moments)
            if moments[len(moments) // 2:].min() < 0:
                raise UserError(f"{path} must hold mean and std, and its std is negative, as a logarithm is")
        if self.with_images or not self.latents:
            path = self.images / self.image_name(i)
            with user_error(f"{path} cannot be read"):
                image = to_tensor(to_rgb(Image.open(path)))
            item["image"] = self.check_shape("image", path, image)
        return item

    def check_shape(self, kind, path, x):
        """x, if it has the shape of the first file of its kind. Raises UserError."""
        if x.ndim != 3:
            raise UserError(f"{path} has the shape {list(x.shape)}, and not three dimensions")
        expected = self.shapes.setdefault(kind, x.shape)
        if x.shape != expected:
            raise UserError(f"{path} has the shape {list(x.shape)}, and the others {list(expected)}: "
                            f"prepare it again")
        return x

    def x0(self, items, xi):
        """Clean samples (B, C, S, S): pixels in [-1, 1], or scale (mean + std xi) of the latents."""
        if not self.latents:
            return items["image"] / 127.5 - 1
        mean, std = items["moments"].chunk(2, dim=1)
        return self.scale * (mean + std * xi)

    def condition(self, items, u, cfg_prob):
        """y of a batch of items; where u (B,) is below cfg_prob it is dropped: replaced by the null label."""
        if self.captions:
            texts = choose_captions(self, items["index"], u, cfg_prob)
            return encode_captions(texts)
        null_label = len(self.classes)
        return torch.where(u < cfg_prob, null_label, items["y"])


def to_device(items):
    return {key: x.to(DEVICE, non_blocking=True) for key, x in items.items()}


# All randomness is a function of (seed, step, position in the global batch). A resumed run, or one on another
# number of processes, sees the same images in the same order, with the same times and noise.

# Two are kept: a batch can span the end of one permutation and the start of the next.
@lru_cache(maxsize=2)
def permutation(n, *key):
    return np.random.default_rng(key).permutation(n)


def batch_indices(n, seed, batch_size, rows, steps):
    """For each step, the indices of these rows of the global batch, from one permutation after another."""
    for step in steps:
        first = step * batch_size
        positions = range(first + rows.start, first + rows.stop)
        yield [permutation(n, seed, p // n)[p % n] for p in positions]


def randomness(n, shape, *key):
    """For a global batch of n: t and u (n,), uniform in [0, 1), and eps and xi (n, *shape), from N(0, 1)."""
    # Every process draws for the whole batch and takes its rows, so that their number does not matter.
    seed = int(np.random.default_rng(key).integers(2 ** 63))
    generator = torch.Generator(DEVICE).manual_seed(seed)
    t, u = torch.rand(2, n, generator=generator, device=DEVICE)
    eps, xi = torch.randn(2, n, *shape, generator=generator, device=DEVICE)
    return t, u, eps, xi


def load_batches(loader):
    """The batches of a DataLoader. Raises UserError with what went wrong in a loader process."""
    batches = iter(loader)
    try:
        yield from batches
    except UserError as e:      # from a loader process, which puts a traceback before the message
        raise UserError(str(e).split("UserError: ")[-1].strip()) from e
    except Exception as e:
        advice = ""
        if "shared memory" in str(e):
            advice = "; in a container use --shm-size 8g, or --num-workers 0"
        raise UserError(f"the data cannot be loaded{advice} ({reason(e)})") from e
    finally:
        if loader.num_workers > 0:
            batches._shutdown_workers()
            # A worker that still waits for a file ignores every signal but this.
            for worker in batches._workers:
                worker.kill()


def write_crops(source, names, out, size, indices):
    """Writes PNGs of these images; returns {index: uint8 (3, R, R)} of those that can be read."""
    crops = {}
    for i in indices:
        try:
            with Image.open(source / names[i]) as image:
                crop = center_crop(to_rgb(image), size)
        except Exception as e:      # a damaged file can make Pillow raise any exception
            print(f"skipping {source / names[i]} ({reason(e)})", file=sys.stderr)
            continue
        with atomic_write(out / PNG.format(i // 1000, i)) as f:
            crop.save(f, "PNG", compress_level=1)
        crops[i] = to_tensor(crop)
    return crops


# Folders with these names are parts of a dataset, and no classes.
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def list_classes(source, names, others, captions):
    """The names of the top folders of these images, sorted, and the label of each image. Raises UserError."""
    top_folders = [name.split("/")[0] if "/" in name else "" for name in names]
    classes, labels = np.unique(top_folders, return_inverse=True)
    folders = {path.name for path in source.glob("*/") if path.is_dir() and not is_hidden(path.name)}
    empty = sorted(folders - set(classes))
    advice = f"--prepare {source} must name a folder with one folder of images for each class"
    if not names:
        raise UserError(f"{advice}: it has no images, and {len(others)} other files")
    # COCO's images are all in one folder.
    if captions:
        return classes.tolist(), labels
    if "" in classes:
        raise UserError(f"{advice}: {top_folders.count('')} images are in none; "
                        f"to train without classes, put all into one folder")
    if empty:
        raise UserError(f"{advice}: no images are in {', '.join(empty)}")
    if len(classes) > 1 and {name.lower() for name in classes} <= SPLITS:
        raise UserError(f"{advice}: {', '.join(classes)} are parts of a dataset; name one of them, such as "
                        f"{source / classes[0]}")
    return classes.tolist(), labels


def begin_prepare(out, settings):
    """Marks a new folder as one of --prepare with these settings, or checks the mark. Raises UserError."""
    marker = out / ".prepare.json"
    if RANK == 0 and not marker.is_file() and all(is_hidden(path.name) for path in out.glob("*")):
        with atomic_write(marker) as f:
            f.write(json.dumps(settings).encode())
    barrier()
    if not marker.is_file():
        raise UserError(f"--data-dir {out} holds files that --prepare did not write: name a new folder")
    before = read_json(marker)
    different = [name for name in settings if before.get(name) != settings[name]]
    if different:
        raise UserError(f"--data-dir {out} was started with other {' and '.join(different)}: "
                        f"name a new folder")


@torch.no_grad()
def prepare(args):
    """--prepare: turns a tree of class folders, or COCO's images and captions, into a dataset at --data-dir.

    Each file gets its name when it is complete, dataset.json comes last, and the same command resumes.
    """
    join_processes(args)
    source = Path(args.prepare)
    out = Path(args.data_dir)
    if source.is_file():
        raise UserError(f"--prepare {source} is a file: unpack it, and name the folder")
    if not source.is_dir():
        raise UserError(f"--prepare {source} does not exist")
    if source.resolve() in out.resolve().parents:
        raise UserError(f"--data-dir {out} is inside of --prepare {source}: name a folder outside of it")
    names, others = list_images(source)
    skipped = ""
    captions = None
    if args.captions:
        if len(args.captions) > 1:
            raise UserError("--captions: --prepare takes one file")
        captions = read_coco(args.captions[0], names)
        with_captions = [name for name in names if name in captions]
        skipped = f"{len(names) - len(with_captions)} without captions, "
        names = with_captions
    classes, labels = list_classes(source, names, others, captions)
    if len(classes) == 1 and not captions:
        print0(f"note: all images are of one class, {classes[0]}; if {source / classes[0]} has a folder for "
               f"each class, name it instead")
    vae = None
    if args.vae != "none":
        if args.resolution % 8:
            raise UserError(f"--resolution {args.resolution} must be a multiple of 8, for the VAE")
        with first_process_first():
            vae = load_vae(args.vae or VAE_ENCODER)
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out) if RANK == 0 else None
    barrier()
    # Names may hold bytes that are not UTF-8.
    digest = hashlib.sha1("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    begin_prepare(
        out, {"images": digest, "--vae": args.vae or VAE_ENCODER, "--resolution": args.resolution})

    # --- images, and their latents: those that are still missing
    # What is written last for an image tells whether it is done.
    template = NPY if vae else PNG
    paths = [out / template.format(i // 1000, i) for i in range(len(names))]
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    # All processes have looked before one writes.
    barrier()
    # The dataset is a list of numbers. collate_fn, in the loader's processes, crops and writes these images.
    loader = DataLoader(missing[RANK::WORLD_SIZE], batch_size=32, num_workers=args.num_workers,
                        collate_fn=partial(write_crops, source, names, out, args.resolution))
    with tqdm(load_batches(loader), total=len(loader), disable=RANK > 0) as bar:
        for crops in bar:
            if vae and crops:
                pixels = torch.stack(list(crops.values())).to(DEVICE) / 127.5 - 1
                latent = vae.encode(pixels).latent_dist
                moments = torch.cat([latent.mean, latent.std], dim=1)
                if not moments.isfinite().all():
                    raise UserError(f"the latents of {names[min(crops)]} or its neighbours are not finite: "
                                    f"use another --vae")
                for i, x in zip(crops, moments.cpu().numpy()):
                    with atomic_write(paths[i]) as f:
                        np.save(f, x)
    barrier()

    # --- dataset.json, of the images and then of the latents
    if RANK == 0:
        done = [i for i, path in enumerate(paths) if path.is_file()]
        if not done:
            raise UserError(f"--prepare {source}: none of its {len(names)} images can be read")
        metadata = {"classes": classes, "vae": args.vae or VAE_ENCODER,
                    "scale": vae.config.scaling_factor if vae else 1.0}
        for template in (PNG, NPY) if vae else (PNG,):
            folder, _, pattern = template.partition("/")
            stored = {i: pattern.format(i // 1000, i) for i in done}
            metadata["labels"] = [[stored[i], int(labels[i])] for i in done]
            if captions:
                metadata["captions"] = {stored[i]: captions[names[i]] for i in done}
            with atomic_write(out / folder / "dataset.json") as f:
                f.write(json.dumps(metadata).encode())
        print0(f"{out}: {len(done):,} images; skipped: {skipped}{len(names) - len(done)} unreadable, "
               f"{len(others)} other files {others[:3]}; classes from 0: {', '.join(classes[:12])}")
        lock.close()


# ---- 7. Processes, models, files ---------------------------------------------------------------------------

def print0(*text):
    """Prints on the first process only."""
    if RANK == 0:
        print(*text, flush=True)


def join_processes(args):
    """Joins torchrun's processes, and chooses the precisions that were not asked for. Raises UserError."""
    cuda = DEVICE.type == "cuda"
    if cuda:
        torch.cuda.set_device(DEVICE)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        with user_error("the processes cannot find each other: start them with torchrun"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    # On a GPU, fp32 is multiplied in TF32.
    torch.set_float32_matmul_precision("high")

    # Where bf16 is emulated it is slower than fp32.
    if cuda:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported()
    args.teacher_precision = args.precision
    if args.precision is None:
        fast = "bf16" if has_bf16 else "fp16" if cuda else "fp32"
        # The frozen teacher needs no more precision, not even on a CPU.
        args.teacher_precision = fast
        args.precision = fast if cuda else "fp32"


def autocast(precision):
    """The context in which modules compute in "bf16" or "fp16"; in "fp32" it changes nothing."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    return torch.autocast(DEVICE.type, dtype, enabled=dtype is not None)


def any_process(flag):
    """True if `flag` is set on any process. Synchronises the processes, not the GPUs."""
    if WORLD_SIZE == 1:
        return bool(flag)
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def barrier():
    """Returns when all processes have come here."""
    any_process(False)


@contextmanager
def first_process_first():
    """Rank 0 enters first, then the first process of each node, then the others: downloads happen once."""
    # Each process passes two barriers: those before its turn, and then those of the later turns.
    turn = 0 if RANK == 0 else 1 if LOCAL_RANK == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()


# Clusters send these before they end a job; a terminal sends SIGINT for Ctrl-C, and SIGHUP when it is closed.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
                if hasattr(signal, name)]


class StopSignals:
    """Inside `with StopSignals() as stop`, a stop signal sets stop.caught, and ends a wait for data.

    A second Ctrl-C ends the program at once.
    """

    def __init__(self):
        self.caught = False
        self.waiting = False

    def __enter__(self):
        self.before = {}
        for number in STOP_SIGNALS:
            # nohup ignores SIGHUP, and it stays ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        # Python runs this between two instructions of the main thread, also while it waits for a batch.
        second = self.caught and number == signal.SIGINT
        self.caught = True
        if self.waiting or second:
            raise KeyboardInterrupt

    def wait_for(self, batches):
        """The next batch, or None if a stop signal came."""
        try:
            self.waiting = True
            return None if self.caught else next(batches)
        except KeyboardInterrupt:
            return None
        finally:
            self.waiting = False


def ignore_stop_signals(worker):
    """Makes a loader process ignore stop signals; the main process ends it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def atomic_write(path):
    """Opens a temporary file that is renamed to `path` after fsync."""
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


def lock_folder(folder):
    """Keeps other runs out of a folder for as long as the file that it returns is open. Raises UserError."""
    file = open(folder / ".lock", "w")
    # Windows has no fcntl; there, runs are not kept apart.
    with suppress(ImportError):
        import fcntl
        try:
            # The system drops the lock with the process, however it ends; loader processes do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another program is writing to {folder}: wait, or name another folder or "
                            f"--exp-name")
        except OSError as e:
            print0(f"note: {folder} cannot be locked against a second run ({reason(e)})")
    return file


def check_output(flag, path):
    """Raises UserError if a file cannot be written there, before the work whose result it is to hold."""
    with user_error(f"{flag} {path} cannot be written"):
        if Path(path).is_dir():
            raise IsADirectoryError("it is a folder")
        os.makedirs(Path(path).absolute().parent, exist_ok=True)


def read_json(path):
    with user_error(f"{path} cannot be read"):
        return dict(json.loads(Path(path).read_text("utf-8-sig")))


def parse_name(name):
    """(class, Config, patch size) of a model's name. Raises UserError."""
    if name == "MMDiT":
        return MMDiT, CONFIGS[name], 2
    match = re.fullmatch("(SiT|DiT)-(XS|S|B|L|XL)/([248])", str(name))
    if not match:
        raise UserError(f"unknown model {name}: choose SiT- or DiT-{{XS,S,B,L,XL}}/{{2,4,8}}, or MMDiT")
    family, size, patch = match.groups()
    return {"SiT": SiT, "DiT": DiT}[family], CONFIGS[size], int(patch)


def build_model(name, **sizes):
    """The model of that name; sizes are arguments of its class, and override those of CONFIGS."""
    model_class, config, patch = parse_name(name)
    arguments = config._asdict()
    # These two are not the model's but the teacher's and the run's.
    del arguments["teacher_blocks"], arguments["tau"]
    arguments |= {"patch_size": patch}
    return model_class(**arguments | sizes)


# Harmless types in the args of other people's checkpoints, under the names that versions of Python and numpy
# give them. numpy pickles numbers and arrays as calls of two functions, which have no public names.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_ARRAY = np.zeros(1).__reduce__()[0]
SAFE_TYPES = [
    argparse.Namespace,
    (PurePosixPath, "pathlib.PosixPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),
    (PureWindowsPath, "pathlib.WindowsPath"),
    (PureWindowsPath, "pathlib._local.WindowsPath"),
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (NUMPY_ARRAY, "numpy.core.multiarray._reconstruct"),
    (NUMPY_ARRAY, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *[type(np.dtype(name)) for name in ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16",
                                        "uint32", "uint64", "float16", "float32", "float64", "str")],
]


def clean_weights(state):
    """A state dict without the prefixes of DDP and torch.compile, and without scalars, such as counters."""
    return {re.sub(r"^(module\.|_orig_mod\.)+|_orig_mod\.", "", key): x for key, x in state.items()
            if isinstance(x, torch.Tensor) and x.ndim > 0}


def read_checkpoint(path, name=None):
    """A checkpoint of ours, of HASTE, REPA, SiT or DiT, or a bare state dict -> a dictionary with "model",
    "ema", "args", "steps" (None if unknown), "opt", "scaler" and "tau".

    Nothing is unpickled that could run code. `name` is used if the checkpoint does not name its model.
    Raises UserError.
    """
    path = Path(path)
    with user_error(f"{path} cannot be read as a checkpoint"), torch.serialization.safe_globals(SAFE_TYPES):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        args = saved.get("args") or {}
        args = dict(args if isinstance(args, dict) else vars(args))
        model = saved.get("model") or saved.get("ema") or saved.get("state_dict") or saved
        ema = saved.get("ema") or model
        result = {"model": clean_weights(model), "ema": clean_weights(ema)}

    # The name of the model decides by which convention the weights are read.
    if not args.get("model"):
        if not name:
            raise UserError(f"{path} does not name its model: use --model, such as --model SiT-XL/2")
        args["model"] = name
        print0(f"{path} does not name its model: it is read as a {name}")
    model_class, _, _ = parse_name(args["model"])
    for key in ("path_type", "prediction"):
        if str(args.get(key, "linear")).lower() not in ("linear", "v", "velocity"):
            raise UserError(f"{path} learned another diffusion than linear paths and velocities: "
                            f"its {key} is {args[key]}")
    with user_error(f"{path} holds no weights of a {args['model']}; name the right --model"):
        for state in (result["model"], result["ema"]):
            if model_class is SiT and is_of_sit(state, args):
                convert_sit(state)
                # SiT's code guides three of its four channels.
                args["guided_channels"] = 3
            if model_class is not MMDiT and add_missing_null_label(state, args):
                # Without label dropout, it cannot be guided.
                args["cfg_prob"] = 0
    steps = saved.get("steps", int(path.stem) if path.stem.isdecimal() else None)
    return result | {"args": args, "steps": steps, "opt": saved.get("opt"), "scaler": saved.get("scaler"),
                     "tau": saved.get("tau")}


def is_of_sit(state, args):
    """True for weights of SiT's own convention, by their output channels or by the words of SiT's args."""
    patches = state["x_embedder.proj.weight"][0]        # (C, patch, patch)
    outputs = len(state["final_layer.linear.bias"])
    words = (args.get("path_type"), args.get("prediction"))
    return outputs == 2 * patches.numel() or words == ("Linear", "velocity")


def convert_sit(state):
    """Converts weights of SiT's own convention, in place and exactly.

    SiT has C or 2C output channels, of which it uses the first C, and its time runs from noise (0) to data
    (1), so that our v(x, t) is -SiT(x, 1 - t). As cos((1 - t) w) = cos w cos(t w) + sin w sin(t w), and
    likewise the sine, the other time is a rotation of the timestep embedding's first layer.
    """
    channels, patch, _ = state["x_embedder.proj.weight"][0].shape
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        outputs = state[key].unflatten(0, (patch ** 2, -1))     # (patch^2, C or 2C, ...)
        state[key] = -outputs[:, :channels].flatten(0, 1)
    w = frequencies().double()
    of_cos, of_sin = state["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)
    rotated = [of_cos * w.cos() + of_sin * w.sin(), of_cos * w.sin() - of_sin * w.cos()]
    state["t_embedder.mlp.0.weight"] = torch.cat(rotated, dim=1)


def add_missing_null_label(state, args):
    """Adds a null label of zeros to a table of labels that was trained without dropout; True if it was."""
    key = "y_embedder.embedding_table.weight"
    classes = args.get("classes") or range(args.get("num_classes", 1000))
    if len(state[key]) != len(classes):
        return False
    state[key] = F.pad(state[key], (0, 0, 0, 1))
    return True


def check_finite(state, path):
    """Raises UserError for tensors that are not finite."""
    # One of them would make every loss and every sample NaN, far from its cause.
    for key, x in state.items():
        if isinstance(x, torch.Tensor) and not x.isfinite().all():
            raise UserError(f"{path}: {key} is not finite")


def load_state(model, state, path):
    """Loads weights -> True if they have a projector that fits; otherwise the model's stays as it is.

    Raises UserError with the first key that differs.
    """
    check_finite(state, path)
    saved_projector = {key: x for key, x in state.items() if key.startswith("projectors.")}
    projector = {key: x for key, x in model.state_dict().items() if key.startswith("projectors.")}
    shapes = {key: x.shape for key, x in projector.items()}
    fits = {key: x.shape for key, x in saved_projector.items()} == shapes
    rest = {key: x for key, x in state.items() if key not in saved_projector}
    with user_error(f"{path} belongs to another model or dataset: name the right --model and --data-dir, or "
                    f"another --exp-name"):
        model.load_state_dict(rest | (saved_projector if fits else projector))
    return fits


def load_ema(path, name=None):
    """(EMA model in eval mode, the run's args) of a checkpoint, for sampling. Raises UserError.

    Width, depth and heads are those of the model's name; other sizes are those of the weights.
    """
    saved = read_checkpoint(path, name)
    args = saved["args"]
    if name and name != args["model"]:
        raise UserError(f"{path} is of a {args['model']}, not of a {name}: leave --model out")
    state = saved["ema"]
    sizes = {}
    with user_error(f"{path} holds no weights of a {args['model']}; name the right --model"):
        _, channels, patch, _ = state["x_embedder.proj.weight"].shape
        side = math.isqrt(state["pos_embed"].shape[1]) * patch
        if "y_embedder.embedding_table.weight" in state:
            sizes["num_classes"] = len(state["y_embedder.embedding_table.weight"]) - 1
        if "projectors.0.4.bias" in state:
            sizes["teacher_dim"] = len(state["projectors.0.4.bias"])
    model = build_model(args["model"], input_size=side, in_channels=channels, **sizes)
    load_state(model, state, path)
    model.can_be_guided = args.get("cfg_prob") != 0
    model.guided_channels = args.get("guided_channels", model.guided_channels)
    # Other people's latents are those of Stable Diffusion's VAE.
    if "scale" not in args:
        args |= {"vae": VAE_ENCODER if channels != 3 else None, "scale": VAE_SCALE}
    warn_of_young_ema(args.get("ema_decay"), saved["steps"])
    return model.to(DEVICE).eval(), args


def warn_of_young_ema(decay, steps):
    """Says so if the EMA, of which samples are drawn, still holds much of the initial weights."""
    share = decay ** steps if decay and steps is not None else 0
    if share > 0.1:
        print0(f"note: after {steps} steps {share:.0%} of the EMA are the weights from before training: "
               f"samples may be noise; train longer, or with a lower --ema-decay than {decay}")


def newest_checkpoint(folder):
    """The path of the newest intact checkpoint, None if there is none. Raises UserError if all are damaged.

    Checkpoints are the files with a step as their name, such as 0050000.pt; other files are left alone.
    """
    # A save that was killed leaves a part of a file.
    for part in folder.glob("*.pt.part"):
        if part.name.removesuffix(".pt.part").isdecimal():
            part.unlink(missing_ok=True)
    paths = [path for path in folder.glob("*.pt") if path.stem.isdecimal()]
    for path in sorted(paths, key=lambda path: int(path.stem), reverse=True):
        # Damage can make zipfile raise any exception. torch's old format is no zip, and has no checksums.
        with suppress(Exception):
            with open(path, "rb") as f:
                old_format = f.read(2) == b"\x80\x02"
            if old_format or zipfile.ZipFile(path).testzip() is None:
                return path
        print0(f"warning: skipping damaged checkpoint {path}")
    if paths:
        raise UserError(f"all checkpoints in {folder} are damaged: move the folder away to start over")


@cache
def load_vae(name):
    """diffusers' AutoencoderKL, frozen. Raises UserError if diffusers or weights are missing."""
    with user_error(f"--vae {name} could not be loaded: it is a name or a folder of diffusers' AutoencoderKL "
                    f"(pip install diffusers); --prepare also takes --vae none, for pixels"):
        from diffusers import AutoencoderKL
        config = AutoencoderKL.load_config(name)
        if config["_class_name"] != "AutoencoderKL":
            raise ValueError(f"only an AutoencoderKL can be used, not a {config['_class_name']}")
        if config.get("shift_factor") or config.get("latents_mean"):
            raise ValueError("only an AutoencoderKL without shifts can be used")
        # Missing weights would otherwise stay on the meta device, and could not be moved.
        vae, info = AutoencoderKL.from_pretrained(name, output_loading_info=True, low_cpu_mem_usage=False)
        if info["missing_keys"]:
            raise ValueError(f"the weight {min(info['missing_keys'])} is missing")
    return vae.to(DEVICE).eval().requires_grad_(False)


def load_decoder(encoder, name, model):
    """The VAE that decodes what `encoder` encoded, None for pixels. Raises UserError."""
    if not encoder:
        return None
    decoder = VAE_DECODER if encoder == VAE_ENCODER else encoder
    vae = load_vae(name or decoder)
    if vae.config.latent_channels != model.in_channels:
        raise UserError(f"the VAE has {vae.config.latent_channels} channels, the model {model.in_channels}")
    return vae


def to_images(x0, vae, scale):
    """x0 (B, C, S, S) -> uint8 (B, 3, R, R): 255 (x + 1) / 2, clamped and truncated, the paper's protocol.

    Raises UserError for values that are not finite.
    """
    x = x0.float()
    if vae:
        x = torch.cat([vae.decode(part).sample for part in (x / scale).split(16)])
    if not x.isfinite().all():
        raise UserError("the decoded images are not finite: use another --vae")
    return (255 * (x + 1) / 2).clamp(0, 255).to(torch.uint8)


# ---- 8. Training -------------------------------------------------------------------------------------------

# The run ends after this many consecutive steps whose gradients were not finite.
MAX_SKIPPED = 50


def resolve(args, data):
    """Fills in what the model's row of CONFIGS and the dataset decide. Raises UserError for misfits."""
    args.model = args.model or DEFAULT_MODEL
    args.exp_name = args.exp_name or args.model.replace("/", "-")
    model_class, config, patch = parse_name(args.model)
    args.attention_blocks = tuple(args.attention_blocks or config.attention_blocks)
    args.teacher_blocks = tuple(args.teacher_blocks or config.teacher_blocks)
    args.encoder_depth = args.encoder_depth or config.feature_block
    args.grid = data.shape[1] // patch
    if args.cfg_prob == 0:
        # Without label dropout there is no guidance, nor in the run's grids.
        args.cfg_scale = 1.0
    if args.tau is None:
        at_512_px = args.model == "SiT-XL/2" and args.grid == 32
        args.tau = 300_000 if at_512_px else config.tau

    # What does not fit together would otherwise fail late, or train something else.
    parts = WORLD_SIZE * args.gradient_accumulation_steps
    if args.batch_size % parts:
        raise UserError(f"--batch-size {args.batch_size} must divide into {parts} equal parts")
    if data.shape[1] != data.shape[2] or data.shape[1] % patch:
        raise UserError(f"{args.model} needs square inputs that divide by {patch}, not {data.shape[1:]}")
    if len(args.attention_blocks) != len(args.teacher_blocks):
        raise UserError("--attention-blocks and --teacher-blocks must have the same length")
    if max(args.attention_blocks) >= config.depth:
        raise UserError(f"--attention-blocks: {args.model} has no block {max(args.attention_blocks)}; "
                        f"the last is {config.depth - 1}")
    if args.encoder_depth > config.depth:
        raise UserError(f"--encoder-depth {args.encoder_depth}: {args.model} has {config.depth} blocks")
    if args.tau != 0 and args.lambda_r == 0 and args.lambda_a == 0:
        raise UserError("--lambda-r 0 and --lambda-a 0 leave nothing to align: use --tau 0")
    if args.tau == "auto" and args.tau_from >= args.max_train_steps:
        raise UserError(f"--tau auto measures first at step {args.tau_from}, and the run ends at "
                        f"{args.max_train_steps}: use a lower --tau-from")
    if args.tau == "auto" and args.lambda_r == 0 and max(args.attention_blocks) < args.encoder_depth - 1:
        raise UserError("--tau auto compares gradients in the block of --encoder-depth, which L_ATTA does "
                        "not reach: use a lower --encoder-depth")
    if model_class is MMDiT and not data.captions:
        raise UserError(f"an MMDiT needs captions, and {args.data_dir} has none: prepare it with --captions")
    if model_class is not MMDiT and data.captions:
        raise UserError(f"{args.data_dir} has captions, which only --model MMDiT learns")


def restore(saved, path, model, ema, optimizer, scaler):
    """Loads a checkpoint into a run. Raises UserError if it is another model's."""
    load_state(ema, saved["ema"], path)
    if not load_state(model, saved["model"], path):
        print0(f"{path} has no projector of this run's: it starts from random weights, and the optimizer's "
               f"state from zero")
    elif not saved["opt"]:
        print0(f"{path} has no optimizer: its state starts from zero")
    else:
        # The learning rate is this command's, and REPA's optimizer is not fused.
        groups = optimizer.state_dict()["param_groups"]
        with user_error(f"{path}: the optimizer's state is another model's"):
            optimizer.load_state_dict(saved["opt"] | {"param_groups": groups})
        for state in saved["opt"]["state"].values():
            check_finite(state, path)
    if saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])


# Flags that decide what a run learns. A resumed run may change them; note_changes says so.
LEARNING_FLAGS = ("data_dir", "teacher", "tau", "tau_from", "tau_every", "tau_images", "tau_cosine",
                  "lambda_r", "lambda_a", "attention_blocks", "teacher_blocks", "encoder_depth", "batch_size",
                  "learning_rate", "max_grad_norm", "ema_decay", "cfg_prob", "seed", "precision")


def note_changes(args, previous):
    """Says what differs between a run's args and those with which its checkpoint was saved."""
    for name in LEARNING_FLAGS:
        if name in previous and previous[name] != args[name]:
            print0(f"note: --{name.replace('_', '-')} was {previous[name]} until now, and is {args[name]} "
                   f"from now on")
    if "dataset" in previous and previous["dataset"] != args["dataset"]:
        print0(f"note: {args['data_dir']} has other images or labels than the run had until now")


def cut_metrics(path, step, auto_tau):
    """Removes the lines after `step` from metrics.jsonl: the resumed run writes them again."""
    if not path.is_file():
        return
    if step == 0:
        # A new run; the lines of another one, whose checkpoints are gone, are kept apart.
        with open(f"{path}.old", "a") as f:
            f.write(path.read_text("utf-8", "replace"))
        path.unlink()
        return
    kept = []
    for line in path.read_text("utf-8", "replace").splitlines():
        # A killed run can leave a torn line.
        with suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            # A measurement comes before the step of its number. It is repeated, unless it set tau.
            repeated = "cosine" in values and values["step"] == step and step != auto_tau
            if values["step"] <= step and not repeated:
                kept.append(line + "\n")
    with atomic_write(path) as f:
        f.write("".join(kept).encode())


def log(run, args, **line):
    """Appends a line to metrics.jsonl, and to W&B if asked for, on the first process."""
    if RANK > 0:
        return
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
    if args.wandb:
        import wandb
        wandb.log(line, step=line["step"])


def start_wandb(args):
    """Starts or resumes the run of that name at Weights & Biases. Raises UserError."""
    with user_error(f"--wandb {args.wandb} failed; it needs pip install wandb, and wandb login"):
        import wandb
        name = re.sub(r"\W", "-", args.exp_name)
        wandb.init(project=args.wandb, id=name, resume="allow", config=vars(args))


class Meter:
    """Losses, speed and memory since the last line of metrics.jsonl, over all processes."""

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.skipped_in_a_row = 0
        self.start_line()

    def start_line(self):
        # Of each step: loss, L_diff, L_REPA, L_ATTA and norm of the gradient.
        self.steps = []
        self.seconds = 0.0
        self.started = time.perf_counter()
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def paused(self):
        """What runs inside, such as saving a checkpoint, does not count as training."""
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.started
        yield
        self.started = time.perf_counter()

    def finish_line(self):
        """Means over the steps that were taken, as a line of the log. Raises UserError after MAX_SKIPPED
        consecutive steps that were skipped."""
        table = torch.stack(self.steps)
        if WORLD_SIZE > 1:
            dist.all_reduce(table)
        # CPU-GPU sync point, once for each line of the log.
        table = table.cpu() / WORLD_SIZE
        taken = table[:, -1].isfinite()
        for ok in taken.tolist():
            self.skipped_in_a_row = 0 if ok else self.skipped_in_a_row + 1
            if self.skipped_in_a_row == MAX_SKIPPED:
                raise UserError(f"no finite gradient in {MAX_SKIPPED} steps in a row: use --precision fp32, "
                                f"or a lower --learning-rate")
        line = {}
        if taken.any():
            names = ("loss", "loss_diff", "loss_repa", "loss_atta", "grad_norm")
            line = dict(zip(names, table[taken].mean(0).tolist()))
        line["skipped_steps"] = int((~taken).sum())
        seconds = self.seconds + time.perf_counter() - self.started
        line["images_per_sec"] = self.batch_size * len(table) / seconds
        if DEVICE.type == "cuda":
            gib = torch.tensor(torch.cuda.max_memory_allocated() / 2 ** 30)
            if WORLD_SIZE > 1:
                dist.all_reduce(gib, dist.ReduceOp.MAX)
            line["gib"] = gib.item()
        self.start_line()
        return line


def compile_blocks(model):
    """Compiles the blocks, which share a graph. Raises UserError without a C++ compiler."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile needs a C++ compiler: install g++, or leave the flag out")
    # Otherwise the graph would be cut at DDP's buckets.
    torch._dynamo.config.optimize_ddp = False
    for block in model.blocks:
        block.compile(dynamic=False)


@torch.no_grad()
def update_ema(ema_parameters, parameters, decay):
    """ema = decay ema + (1 - decay) parameters, in place, in one pass over all of them."""
    torch._foreach_lerp_(ema_parameters, parameters, 1 - decay)


def train(args):
    """Trains args.model on args.data_dir to step args.max_train_steps, from the newest intact checkpoint.

    Returns the exit code: 0, or 75 (start me again) if a signal ended it before. Raises UserError.
    """
    # --- processes, data, the run's folder
    join_processes(args)
    named_model = args.model
    data = Data(args.data_dir)
    resolve(args, data)
    run = Path(args.output_dir, args.exp_name)
    with user_error(f"--output-dir {args.output_dir} cannot be written to"):
        run.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(run) if RANK == 0 else None
    barrier()

    # --- the newest checkpoint, whose name is its step
    newest = newest_checkpoint(run / "checkpoints")
    step = 0
    last_step = args.max_train_steps
    saved = None
    previous = {}
    if newest:
        step = int(newest.stem)
        saved = read_checkpoint(newest, named_model)
        if saved["steps"] not in (None, step):
            print0(f"{newest} was saved after step {saved['steps']}: by its name, the run continues from "
                   f"{step}")
        previous = saved["args"]
        if previous["model"] != args.model:
            raise UserError(f"{newest} is of a {previous['model']}, not of a {args.model}: name the right "
                            f"--model, or another --exp-name")
    if WORLD_SIZE > 1:
        step_of_first = torch.tensor(step)
        dist.broadcast(step_of_first, 0)
        if any_process(step != step_of_first):
            raise UserError(f"the processes see different checkpoints: --output-dir {args.output_dir} must "
                            f"be on a disk that all of them share")
    if step >= last_step:
        print0(f"{run}: {newest} is at step {step}, --max-train-steps {last_step}: there is nothing to train")
        return 0

    # --- tau, at which phase II begins; auto finds it
    auto_tau = None
    if args.tau == "never":
        tau = math.inf
    elif args.tau == "auto":
        auto_tau = saved["tau"] if saved else None
        tau = math.inf if auto_tau is None else auto_tau
    else:
        tau = args.tau

    # --- how a global batch is shared: this process's rows of it, of which it takes a part at a time
    local_batch_size = args.batch_size // WORLD_SIZE
    micro_batch_size = local_batch_size // args.gradient_accumulation_steps
    rows = slice(RANK * local_batch_size, (RANK + 1) * local_batch_size)

    # --- the teacher
    teacher = None
    teacher_dim = 768
    if saved and "projectors.0.4.bias" in saved["model"]:
        teacher_dim = len(saved["model"]["projectors.0.4.bias"])
    with first_process_first():
        if step < tau:
            if not data.images.is_dir():
                raise UserError(f"phase I needs {data.images}: without it, use --tau 0")
            teacher_blocks = args.teacher_blocks if args.lambda_a > 0 else ()
            teacher = load_teacher(args.teacher, args.grid, teacher_blocks).to(DEVICE)
            teacher_dim = teacher.dim
        if data.captions:
            load_clip()

    # --- the student, its EMA, the optimizer
    # All processes start from the same weights.
    torch.manual_seed(args.seed)
    model = build_model(
        args.model, input_size=data.shape[1], in_channels=data.shape[0], num_classes=len(data.classes),
        teacher_dim=teacher_dim, attention_blocks=args.attention_blocks, feature_block=args.encoder_depth)
    model.to(DEVICE)
    model.can_be_guided = args.cfg_prob > 0
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=args.precision == "fp16")
    if saved:
        restore(saved, newest, model, ema, optimizer, scaler)
        # Free its memory: a checkpoint is as large as model, EMA and optimizer together.
        saved = None
    if args.compile:
        compile_blocks(model)

    # --- what the first process writes; what a grid needs is checked before the first step
    run_args = vars(args) | {"vae": data.vae, "scale": data.scale, "classes": data.classes,
                             "trained_labels": data.trained_labels, "dataset": data.digest}
    if args.sampling_steps > 0:
        check_sampler(ema, args.num_steps, args.cfg_scale, (args.guidance_low, args.guidance_high), args.mode)
        if RANK == 0:
            load_decoder(data.vae, args.vae, ema)
            grid_conditions(ema, run_args, args)
    if RANK == 0:
        cut_metrics(run / "metrics.jsonl", step, auto_tau)
        if args.wandb:
            start_wandb(args)
    kind = "latents" if data.latents else "pixels"
    print0(f"{run}: {args.model} on {len(data):,} {kind} {data.shape}, {args.precision}, "
           f"{WORLD_SIZE} x {DEVICE.type}, tau {args.tau}, from step {step}")
    # Other people's checkpoints have flags of other meanings.
    if "trained_labels" in previous:
        note_changes(run_args, previous)
    if not newest:
        warn_of_young_ema(args.ema_decay, last_step)

    # These three use the variables of the loop: step, aligned, bar and auto_tau as they are at the call.
    meter = Meter(args.batch_size)

    def save():
        state = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict(),
                 "scaler": scaler.state_dict(), "args": run_args, "steps": step, "tau": auto_tau}
        path = run / f"checkpoints/{step:07d}.pt"
        with user_error(f"{path} cannot be written"), atomic_write(path) as f:
            torch.save(state, f)

    def log_line():
        line = meter.finish_line()
        log(run, args, step=step, phase=1 if aligned else 2, **line)
        bar.set_postfix({key: f"{line[key]:.4g}" for key in ("loss", "images_per_sec", "gib") if key in line})

    def draw_samples():
        path = run / f"samples/{step:07d}.png"
        try:
            sample_grid(path, ema, run_args, args)
        except Exception as e:      # a picture is no reason to end a run
            print0(f"warning: {path} was not drawn ({reason(e)})")

    batches = None
    stopping = False
    with StopSignals() as stop, tqdm(total=last_step, initial=step, disable=RANK > 0) as bar, \
            ExitStack() as phase_resources:
        while step < last_step:
            # --- the switch: at tau, everything of phase I is dropped at once
            if batches is None or step == tau:
                aligned = step < tau
                phase_end = min(tau, last_step) if aligned else last_step
                if not aligned:
                    teacher = None
                data.with_images = aligned
                # DDP waits for the gradient of each weight that requires one; an unused projector gets none.
                model.projectors.requires_grad_(aligned and args.lambda_r > 0)
                trained = [p for p in model.parameters() if p.requires_grad]
                averaged = [p for p, of_model in zip(ema.parameters(), model.parameters())
                            if of_model.requires_grad]
                # Phase I's DDP is freed first, with its hooks on the model, and its loader processes end.
                net = batches = None
                gc.collect()
                phase_resources.close()
                net = model
                if WORLD_SIZE > 1:
                    net = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
                loader = DataLoader(
                    data, num_workers=args.num_workers, worker_init_fn=ignore_stop_signals,
                    batch_sampler=batch_indices(
                        len(data), args.seed, args.batch_size, rows, range(step, phase_end)),
                    pin_memory=DEVICE.type == "cuda", timeout=300 if args.num_workers else 0)
                batches = phase_resources.enter_context(closing(load_batches(loader)))
                bar.set_description("phase I" if aligned else "phase II")

            # --- the next items of data; all processes stop here if one of them was told to
            # No process has begun the step yet, so that none waits for the gradients of another.
            items = stop.wait_for(batches)
            stopping = any_process(stop.caught)
            if stopping:
                break

            # --- the trigger: is it time for phase II?
            if aligned and trigger_is_due(step, args):
                # A compiled backward pass runs only once, and here there are two.
                with meter.paused(), torch.compiler.set_stance("force_eager"):
                    size = max(1, micro_batch_size // 2)
                    cosines = measure_cosines(model, teacher, data, args, step, size)
                log(run, args, step=step, cosine=sum(cosines) / len(cosines), cosines=cosines)
                # The first process decides for all. As at a tau that was given, a checkpoint is saved.
                if any_process(RANK == 0 and trigger_fires(cosines, args)):
                    tau = step
                    auto_tau = step
                    if meter.steps:
                        log_line()
                    if RANK == 0:
                        save()
                    continue

            # --- the batch: clean samples, conditions, times and noise
            items = to_device(items)
            t, u, eps, xi = [x[rows] for x in randomness(args.batch_size, data.shape, args.seed, step)]
            x0 = data.x0(items, xi)
            y = data.condition(items, u, args.cfg_prob)

            # --- teacher, while step < tau; forward; backward; in parts if memory is short
            means = 0
            for start in range(0, local_batch_size, micro_batch_size):
                i = slice(start, start + micro_batch_size)
                # DDP, if there is one, reads this in its forward pass: the last part averages over processes.
                net.require_backward_grad_sync = i.stop == local_batch_size
                target = None
                if aligned:
                    with autocast(args.teacher_precision):
                        target = teacher(items["image"][i])
                batch = Batch(x0[i], eps[i], t[i], y[i], target)
                with autocast(args.precision):
                    diff, repa, atta = losses(net, model.diffusion, *batch, args.lambda_r, args.lambda_a)
                loss = diff + args.lambda_r * repa + args.lambda_a * atta
                share = micro_batch_size / local_batch_size
                scaler.scale(share * loss).backward()
                means += share * torch.stack([loss, diff, repa, atta]).detach()

            # --- step; if any gradient is not finite, every process skips it
            scaler.unscale_(optimizer)
            max_norm = args.max_grad_norm if args.max_grad_norm > 0 else math.inf
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            # torch's fused optimizers read this attribute, and skip the step if it is 1. A GradScaler sets
            # it, too, but only in fp16, and it would read and write each gradient once more.
            optimizer.found_inf = (~norm.isfinite()).float()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            update_ema(averaged, trained, args.ema_decay)
            step += 1

            # --- log, checkpoint, samples
            bar.update()
            meter.steps.append(torch.stack([*means, norm]))
            at_end = step in (tau, last_step)
            if step % args.log_every == 0 or at_end:
                log_line()
            saving = step % args.checkpointing_steps == 0 or at_end
            sampling = args.sampling_steps > 0 and step % args.sampling_steps == 0
            if RANK == 0 and (saving or sampling):
                with meter.paused():
                    if saving:
                        save()
                    if sampling:
                        draw_samples()

        # --- a stop signal came: save what there is
        if stopping:
            if meter.steps:
                log_line()
            if RANK == 0:
                save()
        # All wait until the first process has saved.
        barrier()
    if lock:
        lock.close()
    print0(f"{run}: saved after step {step}" + ("; stopped, the same command resumes" if stopping else ""))
    # 75 is EX_TEMPFAIL: start me again.
    return 75 if stopping else 0


# ---- 9. Sampling -------------------------------------------------------------------------------------------

def seeded_noise(model, n, seed):
    """n starting points of a sampler, (n, C, S, S)."""
    shape = (n, model.in_channels, model.input_size, model.input_size)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE)


def grid_conditions(model, run_args, args):
    """The names of what --labels or --captions ask for, and the conditions y. Raises UserError."""
    if isinstance(model, MMDiT):
        if args.labels:
            raise UserError("an MMDiT has no --labels: use --captions")
        names = args.captions or ["a red bus"]
        return names, encode_captions(names)
    if args.captions:
        raise UserError("--captions are for an MMDiT: use --labels")
    classes = run_args.get("classes") or [""] * model.num_classes
    trained = run_args.get("trained_labels") or list(range(len(classes)))
    labels = args.labels or trained[:8]
    for label in labels:
        if label not in trained:
            gaps = ", with gaps" if len(trained) < len(classes) else ""
            raise UserError(f"--labels {label}: the classes are {trained[0]} to {trained[-1]}{gaps}")
    names = [f"{label} {classes[label]}" for label in labels]
    return names, torch.tensor(labels, device=DEVICE)


def sample_grid(path, model, run_args, args):
    """Draws args.labels or args.captions as one PNG -> their names. run_args: of the model's run."""
    vae = load_decoder(run_args["vae"], args.vae, model)
    names, y = grid_conditions(model, run_args, args)
    noise = seeded_noise(model, len(y), args.seed)
    interval = (args.guidance_low, args.guidance_high)
    # Another seed, so that the SDE does not draw the starting noise once more.
    torch.manual_seed(args.seed + 1)
    with autocast(args.precision):
        x = sample(model, noise, y, args.num_steps, args.cfg_scale, interval, args.mode)
    with atomic_write(path) as f:
        save_image(to_images(x, vae, run_args["scale"]) / 255, f, "png", padding=1)
    return names


def sample_from(args):
    """--sample: draws a grid from a checkpoint's EMA. Raises UserError."""
    join_processes(args)
    check_output("--out", args.out)
    model, run_args = load_ema(args.sample, args.model)
    if args.compile:
        compile_blocks(model)
    names = sample_grid(args.out, model, run_args, args)
    print0(f"{args.out}: {run_args['model']}, {args.mode} {args.num_steps}, guidance {args.cfg_scale}; "
           f"{', '.join(names)}")


# ---- 10. The paper's other models: DiT, which learns the noise, and MM-DiT, which reads captions -----------

@cache
def ddpm_schedule(steps, device, dtype):
    """(timesteps, table): `steps` of DiT's 1000 timesteps, evenly spaced, and six values of each, (6, steps):
    sqrt abar, sqrt(1 - abar), the posterior's coefficients of x0 and x_t, log beta and log beta~."""
    distance = 999 / (steps - 1)
    # DiT adds the distances up; linspace would round some timesteps to their neighbours.
    timesteps = np.cumsum([0] + (steps - 1) * [distance]).round().astype(int)
    # abar_t = product of 1 - beta up to t; with s, the timestep kept before t, beta = 1 - abar_t / abar_s
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[timesteps]
    abar_s = np.append(1.0, abar[:-1])
    beta = 1 - abar / abar_s
    # q(x_s | x_t, x0) = N((sqrt(abar_s) beta x0 + sqrt(1 - beta) (1 - abar_s) x_t) / (1 - abar_t), beta~)
    c_0 = abar_s ** 0.5 * beta / (1 - abar)
    c_t = (1 - beta) ** 0.5 * (1 - abar_s) / (1 - abar)
    beta_tilde = beta * (1 - abar_s) / (1 - abar)
    # The first would be 0, which has no logarithm.
    beta_tilde[0] = beta_tilde[1]
    table = np.stack([abar ** 0.5, (1 - abar) ** 0.5, c_0, c_t, np.log(beta), np.log(beta_tilde)])
    return timesteps.tolist(), torch.tensor(table, dtype=dtype, device=device)


def ddpm_at(i, x, steps=1000):
    """The six of ddpm_schedule at its i-th timestep; for i (B,) each is (B, 1, 1, 1)."""
    _, table = ddpm_schedule(steps, x.device, x.dtype)
    return table[:, i, None, None, None]


# mean = E q(x_s | x_t, (x_t - sqrt(1 - abar) eps) / sqrt(abar)),  log var = f log beta + (1 - f) log beta~
def posterior(eps, variance, x_t, i, steps=1000):
    """Posterior mean and log variance of p(x_s | x_t), from the model's two outputs, eps and 2 f - 1."""
    signal, noise, c_0, c_t, log_beta, log_beta_tilde = ddpm_at(i, x_t, steps)
    x0 = (x_t - noise * eps) / signal
    f = (variance + 1) / 2
    return c_0 * x0 + c_t * x_t, f * log_beta + (1 - f) * log_beta_tilde


# log P(x) = log(cdf(x + 1/255) - cdf(x - 1/255)) for one of 256 levels in [-1, 1]
def discretized_log_likelihood(x, mean, log_std):
    """x, mean, log_std (B, C, S, S) -> log P(x); the outermost bins reach to infinity."""
    # The normal distribution, by the tanh approximation that DiT was trained with.
    def cdf(edge):
        z = (edge - mean) * torch.exp(-log_std)
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3))) / 2

    above = torch.where(x > 0.999, 1, cdf(x + 1 / 255))
    below = torch.where(x < -0.999, 0, cdf(x - 1 / 255))
    return torch.log((above - below).clamp(min=1e-12))


class DDPM:
    """DiT's diffusion: the model gives the noise and a variance, and its t is an integer, 0 .. 999."""

    modes = ("sde", "ddpm")
    step_range = (2, 1000)

    # x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps
    def add_noise(self, x0, eps, t):
        """x0, eps (B, C, S, S), t (B,) in [0, 1] -> x_t, and t in the model's own units."""
        t = (1000 * t).floor().clamp(max=999)
        signal, noise, *_ = ddpm_at(t.long(), x0)
        return signal * x0 + noise * eps, t

    # L_diff = mean (eps_hat - eps)^2 + L_vb,    L_vb = KL(q(x_s | x_t, x0) || p(x_s | x_t))
    def loss(self, out, x0, eps, x_t, t):
        """L_vb, in bits per dimension, trains only the variance: eps_hat is detached in it.

        At t = 0 it is -log p(x0 | x_t), as if x0 were pixels.
        """
        i = t.long()
        eps_hat, variance = out.chunk(2, dim=1)
        mean, log_var = posterior(eps_hat.detach(), variance, x_t, i)
        _, _, c_0, c_t, _, log_beta_tilde = ddpm_at(i, x0)
        # KL(N(m, v) || N(m', v')) = (v / v' - log(v / v') - 1 + (m - m')^2 / v') / 2
        log_ratio = log_beta_tilde - log_var
        difference = c_0 * x0 + c_t * x_t - mean
        kl = (log_ratio.exp() - log_ratio - 1 + difference ** 2 * (-log_var).exp()) / 2
        nll = -discretized_log_likelihood(x0, mean, log_var / 2)
        bound = torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl)
        return ((eps_hat - eps) ** 2).mean() + bound.mean() / math.log(2)

    def integrate(self, network, x, steps, mode):
        """From noise x through `steps` timesteps, nothing clipped.

        "ddpm" is DiT's own: ancestral, with the learned variance. "sde" is the paper's: Euler-Maruyama for
        dx = -(x / 2 + score) dr + dw with r = -log abar and score = -eps / sqrt(1 - abar).
        """
        timesteps, _ = ddpm_schedule(steps, x.device, x.dtype)
        for i in tqdm(range(steps - 1, -1, -1), desc="sampling", disable=RANK > 0, leave=False):
            out = network(x, timesteps[i], t_guide=timesteps[i] / 1000)
            eps, variance = out.chunk(2, dim=1)
            if mode == "ddpm":
                mean, log_var = posterior(eps, variance, x, i, steps)
                std = torch.exp(log_var / 2)
            else:
                signal, noise, *_ = ddpm_at(i, x, steps)
                signal_next = ddpm_at(i - 1, x, steps)[0] if i > 0 else 1
                dr = 2 * torch.log(signal_next / signal)
                mean = x + (x / 2 - eps / noise) * dr
                std = dr ** 0.5
            x = mean
            # There is no noise in the last step.
            if i > 0:
                x = x + std * torch.randn_like(x)
        return x


class DiT(SiT):
    """SiT's network, with noise and variance as its output, (B, 2C, S, S), and DDPM in Flow's place."""

    def __init__(self, in_channels=4, **sizes):
        super().__init__(in_channels=in_channels, out_channels=2 * in_channels, **sizes)
        self.diffusion = DDPM()
        # DiT's code guides the first three channels.
        self.guided_channels = 3


class Stream(nn.Module):
    """Text or image in a JointBlock: its weights before and after the attention that they share."""

    def __init__(self, dim, num_heads, ends_in_attention=False):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = LayerNorm(dim)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim)})
        modulations = 2 if ends_in_attention else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, modulations * dim))
        if not ends_in_attention:
            self.attn["proj"] = nn.Linear(dim, dim)
            self.norm2 = LayerNorm(dim)
            self.mlp = Mlp(dim, 4 * dim, act_layer=GELUTanh)

    def before_attention(self, x, c):
        """q, k, v (B, heads, tokens, head_dim), and the modulations for what comes after."""
        shift, scale, *rest = self.adaLN_modulation(c).split(x.shape[-1], dim=1)
        qkv = self.attn["qkv"](modulate(self.norm1(x), shift, scale))
        return split_heads(qkv, self.num_heads), rest

    def after_attention(self, x, attended, rest):
        gate_msa, shift_mlp, scale_mlp, gate_mlp = rest
        x = x + gate_msa[:, None] * self.attn["proj"](attended)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class JointBlock(nn.Module):
    """One attention over text and image; each has its own weights. The text of the last block ends there."""

    def __init__(self, dim, num_heads, last):
        super().__init__()
        self.last = last
        self.context_block = Stream(dim, num_heads, ends_in_attention=last)
        self.x_block = Stream(dim, num_heads)

    def forward(self, x, text, c):
        """Image x (B, N, D), text (B, T, D), c (B, D) -> x, text, and the image's (q, k)."""
        (q_text, k_text, v_text), rest_text = self.context_block.before_attention(text, c)
        (q_x, k_x, v_x), rest_x = self.x_block.before_attention(x, c)
        q = torch.cat([q_text, q_x], dim=2)
        k = torch.cat([k_text, k_x], dim=2)
        v = torch.cat([v_text, v_x], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)   # (B, T + N, D)
        attended_text, attended_x = attended.split([text.shape[1], x.shape[1]], dim=1)
        if not self.last:
            text = self.context_block.after_attention(text, attended_text, rest_text)
        x = self.x_block.after_attention(x, attended_x, rest_x)
        return x, text, (q_x, k_x)


class MMDiT(nn.Module):
    """The text-to-image MM-DiT, named as in the released HASTE. Its condition y is a text, (B, T, 768).

    All weights keep torch's default initialisation, as in the released code.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=768, depth=24, num_heads=24,
                 num_classes=1, attention_blocks=(4, 5, 6, 7), feature_block=8,
                 teacher_dim=768, projector_dim=2048):
        super().__init__()
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        # Captions take the place of classes, whose number is not used.
        self.num_classes = num_classes
        self.attention_blocks = attention_blocks
        self.feature_block = feature_block
        self.diffusion = Flow()
        self.guided_channels = in_channels
        self.can_be_guided = True

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.context_embedder = nn.Linear(768, hidden_size)
        positions = sincos_positions(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.joint_blocks = nn.ModuleList(
            JointBlock(hidden_size, num_heads, last=i == depth - 1) for i in range(depth))
        self.projectors = nn.ModuleList([build_projector(hidden_size, projector_dim, teacher_dim)])
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * in_channels)

    # The released weights call them joint_blocks; the trigger and --compile look for blocks, as in SiT.
    @property
    def blocks(self):
        return self.joint_blocks

    def forward(self, x, t, y, align=False):
        """As SiT.forward, with y (B, T, 768)."""
        x = self.x_embedder(x) + self.pos_embed
        text = self.context_embedder(y)
        c = self.t_embedder(t)
        states = []
        for block in self.joint_blocks:
            x, text, qk = block(x, text, c)
            if align:
                states.append((x, qk))
        return self.outputs(x, c, states)

    # The two end alike.
    outputs = SiT.outputs

    def null_condition(self, y):
        """The encoding of the empty caption, in the shape of y."""
        return encode_captions([""]).expand_as(y)


CLIP = "openai/clip-vit-large-patch14"


@cache
def load_clip():
    """(tokenizer, frozen text model) of CLIP. Raises UserError."""
    with user_error(f"the text model {CLIP} could not be loaded; captions need pip install transformers"):
        from transformers import CLIPTextModel, CLIPTokenizer
        tokenizer = CLIPTokenizer.from_pretrained(CLIP)
        model = CLIPTextModel.from_pretrained(CLIP)
    return tokenizer, model.to(DEVICE).eval().requires_grad_(False)


@torch.no_grad()
def encode_captions(texts):
    """n texts -> the last hidden states of CLIP's text model, (n, 77, 768). Raises UserError."""
    tokenizer, model = load_clip()
    length = model.config.max_position_embeddings
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return model(ids.input_ids.to(DEVICE)).last_hidden_state


def read_coco(path, names):
    """{name: captions} of those images that have captions in COCO's JSON. Raises UserError."""
    coco = read_json(path)
    captions = {}
    with user_error(f"{path} is not COCO's JSON of captions"):
        file_names = {image["id"]: image["file_name"] for image in coco["images"]}
        for annotation in coco["annotations"]:
            text = (annotation["caption"] or "").strip()
            # An empty text would stand for no caption.
            if text:
                captions.setdefault(file_names.get(annotation["image_id"]), []).append(text)
    found = {}
    times = Counter(map(os.path.basename, names))
    for name in names:
        # A file's name alone suffices where no other folder has the same.
        texts = captions.get(name)
        if not texts and times[os.path.basename(name)] == 1:
            texts = captions.get(os.path.basename(name))
        if texts:
            found[name] = texts
    if not found:
        raise UserError(f"{path} has no captions of these images: name the file of the same images")
    return found


def choose_captions(data, indices, u, cfg_prob):
    """A caption of each image, or "" if u (B,) < cfg_prob; the rest of the interval chooses the caption."""
    texts = []
    for i, x in zip(indices.tolist(), u.tolist()):
        captions = data.captions[data.names[i]]
        if x < cfg_prob:
            texts.append("")
            continue
        # What remains of the interval is uniform, too.
        share = (x - cfg_prob) / (1 - cfg_prob)
        texts.append(captions[int(share * len(captions))])
    return texts


# ---- 11. The command line ----------------------------------------------------------------------------------

DEFAULT_MODEL = "SiT-XL/2"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of a flag that has one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong flag, without the list of all flags."""

    def __init__(self, program):
        super().__init__(program, formatter_class=HelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; --help lists all flags")


def number(kind, low, high=math.inf):
    """The type of a flag: a finite int or float from low to high."""
    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value != math.inf:
                return value
        name = "whole number" if kind is int else "number"
        upper = f"to {high}" if high != math.inf else "up"
        raise argparse.ArgumentTypeError(f"{text} is not a {name} from {low} {upper}")
    return parse


def step_never_or_auto(text):
    """The type of --tau."""
    if text in ("never", "auto"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither a step, such as 250000, nor never, nor auto")
    return int(text)


COUNT = number(int, 1)
COUNT_OR_0 = number(int, 0)
WEIGHT = number(float, 0)
SHARE = number(float, 0, 1)


def add_sampler_flags(parser, cfg_scale):
    """The flags that --sample, the grids of a run and evaluate.py share."""
    add = parser.add_argument_group("sampler").add_argument
    add("--mode", choices=("sde", "ode", "heun", "ddpm"), default="sde",
        help="sde, ode or heun; a DiT has sde, or ddpm, its own")
    add("--num-steps", type=COUNT, default=250, help="steps of the sampler")
    add("--cfg-scale", type=WEIGHT, default=cfg_scale, help="guidance scale; 1 is no guidance")
    add("--guidance-low", type=SHARE, default=0.0, help="guide if t is in [low, high]")
    add("--guidance-high", type=SHARE, default=1.0, help="guide if t is in [low, high]")


def add_common_flags(parser, precision_help, precision=None):
    """The flags that haste.py and evaluate.py share."""
    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="seed of all randomness")
    add("--precision", choices=("bf16", "fp16", "fp32"), default=precision, help=precision_help)
    add("--compile", action="store_true", help="compile the model's blocks")
    add("--vae", help="an AutoencoderKL of diffusers, a name or a folder; none prepares pixels "
                      "(default: Stable Diffusion's)")
    add("--num-workers", type=COUNT_OR_0, default=min(4, os.cpu_count()),
        help="loader processes for each process")


def parse_args(argv=None):
    """The values of haste.py's flags, which are named as in SiT, REPA and HASTE."""
    parser = Parser("haste.py")
    group = parser.add_argument_group("what to do, if not to train")
    add = group.add_mutually_exclusive_group().add_argument
    add("--demo", action="store_true", help="everything on letters, offline; other flags go to its training")
    add("--prepare", metavar="IMAGES", help="turn this tree of class folders into a dataset at --data-dir")
    add("--sample", metavar="CHECKPOINT", help="draw --labels or --captions from this checkpoint's EMA")
    add = group.add_argument
    add("--compare", action="store_true", help="with --demo: plain, REPA, attention and HASTE side by side")
    add("--seeds", type=COUNT, default=1, help="with --compare: runs of each of them, from --seed")

    add = parser.add_argument_group("data").add_argument
    add("--data-dir", default="data/imagenet256", help="a prepared dataset")
    add("--resolution", type=COUNT, default=256,
        help="of the images that --prepare writes; training takes the dataset's")
    add("--captions", nargs="+", help="for --sample, what to draw; for --prepare, COCO's JSON file")

    add = parser.add_argument_group("alignment").add_argument
    add("--model", help=f"SiT- or DiT-[XS,S,B,L,XL]/[2,4,8], or MMDiT (default: {DEFAULT_MODEL})")
    add("--teacher", "--enc-type", default="dinov2_vitb14",
        help="dinov2_vit[s,b,l,g]14, also with _reg, or a file (see README)")
    add("--tau", "--early-stop-point", type=step_never_or_auto,
        help="the step at which alignment stops, never, or auto (default: the paper's for the model)")
    add("--tau-from", type=COUNT_OR_0, default=50_000, help="auto: the first measurement")
    add("--tau-every", type=COUNT, default=10_000, help="auto: steps between measurements")
    add("--tau-images", type=COUNT, default=2048, help="auto: images in a measurement")
    add("--tau-cosine", type=number(float, -1, 1), default=-0.05, help="auto: stop below it")
    add("--lambda-r", "--proj-coeff", type=WEIGHT, default=0.5, help="weight of L_REPA")
    add("--lambda-a", "--attn-coeff", type=WEIGHT, default=0.5, help="weight of L_ATTA")
    add("--attention-blocks", type=COUNT_OR_0, nargs="+", help="the student's, from 0 (default: the paper's)")
    add("--teacher-blocks", type=number(int, 0, 11), nargs="+",
        help="their partners, from 0 to 11 for a teacher of 12 blocks (default: the paper's)")
    add("--encoder-depth", type=COUNT,
        help="the block whose tokens are aligned, from 1 (default: the paper's)")

    add = parser.add_argument_group("training").add_argument
    add("--output-dir", default="runs", help="output folder of all runs")
    add("--exp-name", help="the run's folder in it (default: the model's name)")
    add("--batch-size", type=COUNT, default=256, help="global batch, over all processes")
    add("--gradient-accumulation-steps", type=COUNT, default=1, help="parts of a batch, to save memory")
    add("--max-train-steps", type=COUNT, default=400_000, help="where training ends")
    add("--learning-rate", type=WEIGHT, default=1e-4, help="of AdamW, constant")
    add("--max-grad-norm", type=WEIGHT, default=1.0, help="clip gradients to this norm; 0 turns clipping off")
    add("--ema-decay", type=SHARE, default=0.9999, help="of the weights that are sampled")
    add("--cfg-prob", type=SHARE, default=0.1, help="label dropout, for guidance")
    add("--log-every", type=COUNT, default=100, help="steps between lines of metrics.jsonl")
    add("--checkpointing-steps", type=COUNT, default=50_000, help="steps between checkpoints")
    add("--sampling-steps", type=COUNT_OR_0, default=10_000,
        help="steps between grids of samples; 0 draws none")
    add("--wandb", metavar="PROJECT", help="log to this project of Weights & Biases, too")

    add = parser.add_argument_group("sampling").add_argument
    add("--labels", type=COUNT_OR_0, nargs="+",
        help="classes of --sample and of the grids (default: the first 8)")
    add("--out", default="samples.png", help="the picture that --sample writes")

    add_sampler_flags(parser, cfg_scale=4.0)
    add_common_flags(parser, "default: bf16 on a GPU that has it, else fp16; fp32 on a CPU")
    args = parser.parse_args(argv)
    if args.compare and not args.demo:
        parser.error("--compare is a part of --demo: use both")
    return args


class Output:
    """A stream whose write errors are ignored: a closed pipe or terminal does not end a run."""

    def __init__(self, stream):
        # After 2>&- there is no stream.
        self.stream = stream or open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except UnicodeEncodeError:      # the terminal lacks a letter
            self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            # From now on the stream leads to nowhere, also when Python flushes it at its end.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def flush(self):
        """Does nothing: write has flushed."""


@contextmanager
def exit_on_user_error(program):
    """Prints a user error as one sentence, and ends the program with exit code 1."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        yield
        if dist.is_initialized():
            # On torch 2.6 the group's end can wait for gloo's thread while that waits for Python, to free the
            # tensors of the last messages. It takes them a moment.
            time.sleep(0.1)
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError as e:
        sys.exit(f"{program}: out of GPU memory: use --gradient-accumulation-steps, or a smaller "
                 f"--batch-size ({reason(e)})")
    except (UserError, OSError, MemoryError, dist.DistError) as e:
        # For whoever changes this file, python -X dev shows the traceback.
        if sys.flags.dev_mode:
            raise
        message = " ".join(str(e).split())
        sys.exit(f"{program}: {message}")
    finally:
        sys.stdout, sys.stderr = streams


def main(argv=None):
    """Runs the command line `argv` -> its exit code. Raises SystemExit with a sentence for an error."""
    with exit_on_user_error("haste.py"):
        args = parse_args(argv)
        if args.demo:
            if __name__ != "haste":
                raise UserError("--demo needs this file under the name haste.py, which evaluate.py imports")
            with user_error("--demo needs evaluate.py in the same folder"):
                import evaluate
            return evaluate.demo(sys.argv[1:] if argv is None else argv)
        if args.prepare:
            return prepare(args)
        if args.sample:
            return sample_from(args)
        return train(args)


if __name__ == "__main__":
    if Path(__file__).resolve().stem == "haste":
        # evaluate.py imports haste, and both must share one module.
        import haste
        sys.exit(haste.main())
    # A copy of this file under another name runs its own code.
    sys.exit(main())
