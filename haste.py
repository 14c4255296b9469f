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
paper, in its order. Section 8 is the training loop. Section 10 has the paper's two other models, DiT and
MM-DiT. For them, sections 1 to 4 have out_channels, guided_channels, the arguments x_t and t of Flow.loss,
and the row MMDiT of CONFIGS; a reader of SiT can skip these.

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
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from timm.layers import GELUTanh, Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

# Set by torchrun.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

# To use the CPU of a machine with a GPU, set CUDA_VISIBLE_DEVICES= (to nothing).
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")


class UserError(Exception):
    """A user error, printed as one sentence. Everything else is a traceback."""


@contextmanager
def user_error(sentence):
    """Re-raises an exception as a UserError that begins with `sentence`."""
    try:
        yield
    except Exception as e:
        message = " ".join(str(e).split())
        raise UserError(f"{sentence} ({type(e).__name__}: {message[:1000]})") from e


# ---- 1. The student: SiT -----------------------------------------------------------------------------------

class Config(NamedTuple):
    """Sizes of one of the paper's models, which of its blocks are aligned with which, and tau."""
    depth: int
    hidden_size: int
    num_heads: int
    attention_blocks: tuple     # the student's, from 0
    feature_block: int          # the block whose tokens are aligned, from 1, as REPA counts
    projector_dim: int
    teacher_blocks: tuple       # the partners of attention_blocks, from 0, in a teacher of 12 blocks
    tau: int


# At 512 px, the tau of SiT-XL/2 is 300,000. S is not in the paper, and has the blocks of B. XS is for --demo.
CONFIGS = {
    #             depth width heads attention     feature projector teacher          tau
    "XS": Config(     6,  128,    4, (1, 2, 3),         4,      256, (9, 10, 11),    350),
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
    """Class labels y (B,) -> (B, D). The last row is the null label, for guidance (Ho and Salimans, 2021).

    A class of its own gives the table the name that it has in DiT's, SiT's and REPA's checkpoints.
    """

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

    attention_blocks count from 0, feature_block from 1. Labels are dropped by the data (section 6), not here.
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
        # Guidance acts on the first channels: all of SiT's, three of DiT's.
        self.guided_channels = in_channels
        # A model that was trained without label dropout cannot be guided.
        self.can_be_guided = True

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        positions = sincos_positions(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        # A list of one, and in this place, for REPA's names of weights and its optimizer's order of them.
        self.projectors = nn.ModuleList()
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * (out_channels or in_channels))
        self.initialize_weights()
        # The projector is drawn last, so that the other weights do not depend on the teacher's width.
        self.projectors.append(build_projector(hidden_size, projector_dim, teacher_dim))
        self.projectors.apply(xavier)

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

    def forward(self, x, t, y, align=False):
        """x (B, C, S, S), t (B,), y (B,) -> v (B, C, S, S).

        With align: v, z (B, N, teacher_dim), [(q, k), ...] of attention_blocks, (B, heads, N, head_dim) each.
        """
        x = self.x_embedder(x) + self.pos_embed         # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)     # (B, D)
        tokens = []
        qk = []
        for block in self.blocks:
            x, block_qk = block(x, c)
            if align:
                # References only: the backward pass keeps these tensors anyway.
                tokens.append(x)
                qk.append(block_qk)
        v = unpatchify(self.final_layer(x, c), self.patch_size)
        if not align:
            return v
        z = self.projectors[0](tokens[self.feature_block - 1])
        return v, z, [qk[i] for i in self.attention_blocks]

    def null_condition(self, y):
        """The null label in the shape of y, for unconditional samples (Ho and Salimans, 2021)."""
        return torch.full_like(y, self.num_classes)


# ---- 2. The teacher: DINOv2, frozen ------------------------------------------------------------------------

# A commit, so that the code that is downloaded stays the code that was tested here.
DINOV2_REPO = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"
# REPA's names of encoders (--enc-type), and ours.
ENCODERS = {
    "dinov2-vit-b": "dinov2_vitb14",
    "dinov2-vit-l": "dinov2_vitl14",
    "dinov2-vit-g": "dinov2_vitg14",
    "dinov1-vit-b": "vit_base_patch16_224.dino",
    "clip-vit-L": "vit_large_patch14_clip_quickgelu_224.openai",
    "mae-vit-l": "vit_large_patch16_224.mae",
}


class Teacher(nn.Module):
    """A frozen ViT that returns its patch tokens and the queries and keys of some blocks (y and A^T).

    vit: DINOv2 of torch.hub, or a timm VisionTransformer; blocks count from 0. grid: the student's tokens on
    a side, to which images and position embeddings are resampled. mean, std: of its images, in [0, 1].
    """

    def __init__(self, vit, blocks, grid, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
        super().__init__()
        self.blocks = blocks
        self.grid = grid
        self.size = grid * vit.patch_embed.patch_size[0]
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

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
            vit.blocks[b].attn.qkv.register_forward_hook(partial(keep_output, self.qkv, b))

    @torch.no_grad()
    def forward(self, images):
        """images (B, 3, H, W) uint8 -> features (B, N, D_T), [(q, k), ...] as the student's."""
        x = (images - self.mean) / self.std
        x = F.interpolate(x, self.size, mode="bicubic")
        features = self.vit.forward_features(x)
        # The hub's DINOv2 returns a dictionary.
        if isinstance(features, dict):
            features = features["x_norm_patchtokens"]
        # The last N tokens are the patches; class and register tokens come before them. Without their q and k
        # the logits lack their rows and columns, so that the maps are of the patches alone.
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


def keep_output(kept, key, module, args, output):
    """A forward hook, with the dictionary and the key under which the module's output is kept."""
    kept[key] = output


def fused_attention(attn, x):
    """The attention of the hub's DINOv2 by torch's fused kernel: without xFormers, it forms its maps."""
    q, k, v = split_heads(attn.qkv(x), attn.num_heads)
    x = F.scaled_dot_product_attention(q, k, v)
    return attn.proj(x.transpose(1, 2).flatten(2))


def load_vit(name):
    """The ViT called `name`, and the mean and std of its images.

    name: a DINOv2 of torch.hub (the paper's is dinov2_vitb14), a timm VisionTransformer, or a file
    {"config", "model"} with the arguments and weights of one, and its "mean" and "std" if not ImageNet's.
    """
    name = ENCODERS.get(name, name)
    normalisation = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    offline = "without internet, copy its cache from a machine that has loaded it, or use --teacher FILE"
    if name.startswith("dinov2_"):
        with user_error(f"--teacher {name} could not be loaded into {torch.hub.get_dir()}: {offline}"):
            vit = torch.hub.load(DINOV2_REPO, name, trust_repo=True, skip_validation=True)
        type(vit.blocks[0].attn).forward = fused_attention
    elif timm.is_model(name):
        with user_error(f"--teacher {name} could not be loaded by timm: {offline}"):
            vit = timm.create_model(name, pretrained=True, dynamic_img_size=True)
        data = resolve_model_data_config(vit)
        normalisation = data["mean"], data["std"]
    else:
        with user_error(f"--teacher {name} is no dinov2_vit[s,b,l,g]14[_reg], no model of timm, and no file "
                        f'that holds {{"config": {{...}}, "model": weights}} of a timm VisionTransformer'):
            saved = torch.load(name, map_location="cpu", weights_only=True)
            vit = VisionTransformer(**saved["config"] | {"dynamic_img_size": True})
            vit.load_state_dict(saved["model"])
        normalisation = saved.get("mean", normalisation[0]), saved.get("std", normalisation[1])
    return vit, normalisation


def load_teacher(name, grid, blocks):
    """The Teacher called `name`, see load_vit.

    blocks are those of a ViT of 12 blocks, from 0 to 11; in a teacher of another depth the indices are
    shifted to keep their distance from the last block.
    """
    vit, (mean, std) = load_vit(name)
    shift = len(vit.blocks) - 12
    for b in blocks:
        if not 0 <= b + shift < len(vit.blocks):
            raise UserError(f"there is no teacher block {b}: the blocks of {name} count as the last "
                            f"{len(vit.blocks)} of 12; choose others with --teacher-blocks")
    for block in vit.blocks:
        if type(block.attn).__name__ not in ("Attention", "MemEffAttention"):
            raise UserError(f"--teacher {name} has blocks with {type(block.attn).__name__}, whose maps are "
                            f"not softmax(q k^T): use another teacher")
    return Teacher(vit, [b + shift for b in blocks], grid, mean, std)


# ---- 3. Diffusion: the flow that SiT learns, and its samplers ----------------------------------------------

class Flow:
    """The linear interpolant from data to noise, and its velocity (the SiT paper, section 2)."""

    modes = ("sde", "ode", "heun")

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
            # The score grows without bound towards t = 0; the last step, from 0.04, takes the mean.
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


@torch.no_grad()
def sample(model, noise, y, steps=250, cfg_scale=1.0, guidance=(0.0, 1.0), mode="sde"):
    """noise (B, C, S, S) and conditions y, such as labels (B,) -> samples (B, C, S, S), in fp64.

    "sde" is the paper's: Euler-Maruyama with `steps` evaluations, t from 1 to 0.04, and then the mean at 0.
    "ode" is Euler's method, "heun" is Heun's with 2 * steps - 1 evaluations. Guidance acts in the steps that
    begin at a t in the interval `guidance`.
    """
    if mode not in model.diffusion.modes:
        raise UserError(f"this model has no sampler {mode}: use --mode {' or '.join(model.diffusion.modes)}")
    if cfg_scale != 1 and not model.can_be_guided:
        raise UserError("a model trained without label dropout cannot be guided: use --cfg-scale 1")
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

    return model.diffusion.integrate(guided_network, noise.double(), steps, mode)


# ---- 4. Alignment: the two losses --------------------------------------------------------------------------

# L_REPA = - mean over images and tokens of cos(proj(h), y)
def feature_loss(z, features):
    """z = proj(h) and the teacher's features, (B, N, D_T) each -> L_REPA, a scalar in [-1, 1].

    In fp32: normalising in fp16 gives NaN.
    """
    return -F.cosine_similarity(z.float(), features.float(), dim=-1).mean()


# - mean over images, heads and rows i of sum_j A^T_ij log A^S_ij,  with A = softmax(q k^T / sqrt(head_dim))
def pair_loss(q, k, q_t, k_t):
    """(q, k) of a student's block and of its partner in the teacher -> L_ATTA of this pair, a scalar.

    As in the paper, student head i is paired with teacher head i, for the first 12 heads: its teacher, a
    ViT-B, has no more. The others are not aligned, even if a larger teacher has them, too. Products and
    softmax are outside of autocast; on a GPU, fp32 products are in TF32, as elsewhere.
    """
    heads = min(q.shape[1], q_t.shape[1], 12)
    q, k, q_t, k_t = [x[:, :heads].float() for x in (q, k, q_t, k_t)]
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ k.mT / q.shape[-1] ** 0.5                  # (B, heads, N, N)
        maps = (q_t @ k_t.mT / q_t.shape[-1] ** 0.5).softmax(dim=-1)
        return F.cross_entropy(logits.flatten(0, 2), maps.flatten(0, 2))


# L_ATTA = the mean over the pairs of blocks
def attention_loss(student_qk, teacher_qk):
    """Two lists with a pair (q, k) for each block, (B, heads, N, head_dim) each -> L_ATTA, a scalar."""
    # The backward pass computes the maps again, so that only those of one pair are in memory at a time.
    pair_losses = [recompute(pair_loss, *student, *teacher, use_reentrant=False, preserve_rng_state=False)
                   for student, teacher in zip(student_qk, teacher_qk, strict=True)]
    return torch.stack(pair_losses).mean()


def loss_weights(args):
    """The weight of each term of the objective."""
    return {"diff": 1.0, "repa": args.lambda_r, "atta": args.lambda_a}


# L = L_diff + lambda_R L_REPA + lambda_A L_ATTA
def objective(terms, weights):
    """The terms that a step has computed, {name: scalar}, and the weights of all terms -> their sum."""
    return sum(weights[name] * term for name, term in terms.items())


def alignment_losses(z, student_qk, features, teacher_qk, weights):
    """What student and teacher return for the same images -> {name: scalar}, where the weight is not 0."""
    terms = {}
    if weights["repa"] > 0:
        terms["repa"] = feature_loss(z, features)
    if weights["atta"] > 0:
        terms["atta"] = attention_loss(student_qk, teacher_qk)
    return terms


def losses(net, diffusion, x0, eps, t, y, target, weights):
    """A batch -> the terms of the objective, not yet weighted, {"diff": L_diff, "repa": ..., "atta": ...}.

    target: the teacher's (features, qk) for the same images; None in phase II, which has L_diff alone.
    """
    x_t, t = diffusion.add_noise(x0, eps, t)
    # Phase I also projects tokens and forms attention maps; phase II does neither.
    if target is None:
        v = net(x_t, t, y)
    else:
        v, z, student_qk = net(x_t, t, y, align=True)
    # The losses are outside of autocast.
    with torch.autocast(x0.device.type, enabled=False):
        terms = {"diff": diffusion.loss(v.float(), x0, eps, x_t, t)}
        if target is not None:
            terms |= alignment_losses(z, student_qk, *target, weights)
    return terms


# ---- 5. Termination: the gradient-angle trigger of appendix A.2 --------------------------------------------

# At step --tau-from, and then every --tau-every steps, the gradients of the two parts of the objective are
# compared on --tau-images images at these times. Alignment ends at the first measurement whose mean cosine is
# below --tau-cosine: then the teacher begins to work against the diffusion loss.
TRIGGER_TIMES = (0.02, 0.1, 0.5, 0.8)


def trigger_is_due(step, args):
    """True if the gradients are to be compared after this step (appendix A.2)."""
    return args.tau == "auto" and step >= args.tau_from and (step - args.tau_from) % args.tau_every == 0


# grad (lambda_R L_REPA + lambda_A L_ATTA) and grad L_diff
def gradients(model, x0, eps, t, y, target, weights):
    """The two gradients for the P parameters of the feature block: (2, P) (appendix A.2)."""
    parameters = list(model.blocks[model.feature_block - 1].parameters())
    terms = losses(model, model.diffusion, x0, eps, t, y, target, weights)
    diff = terms.pop("diff")
    align = objective(terms, weights)
    # A parameter that a loss does not reach has the gradient 0.
    of_align = torch.autograd.grad(align, parameters, retain_graph=True, materialize_grads=True)
    of_diff = torch.autograd.grad(diff, parameters, materialize_grads=True)
    flat = [nn.utils.parameters_to_vector(gradient) for gradient in (of_align, of_diff)]
    return torch.stack(flat)


# A compiled backward pass runs only once, and here there are two.
@torch.compiler.set_stance("force_eager")
def measure_cosines(model, teacher, data, args, step, size):
    """The cosine of the two gradients at each of TRIGGER_TIMES (appendix A.2), `size` images at a time.

    In fp32, without autocast. The paper does not say how images are averaged; here the gradients are those of
    the mean losses.
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
            t = x0.new_full((len(i),), t)
            total[k] += len(i) * gradients(model, x0, eps[i], t, y, target, loss_weights(args))
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    return F.cosine_similarity(total[:, 0], total[:, 1], dim=1).tolist()


def trigger_fires(cosine, args):
    """True if alignment ends here: by the mean cosine, the two gradients point apart (appendix A.2)."""
    # The first process decides for all.
    return any_process(RANK == 0 and cosine < args.tau_cosine)


# ---- 6. Data: images and their latents ---------------------------------------------------------------------

# A dataset has the layout of REPA's preprocessing. --prepare adds "classes", "vae", ... to the JSON.
#   images/00000/img00000000.png              a cropped image
#   images/dataset.json                       {"labels": [[name, label], ...]}
#   vae-sd/00000/img-mean-std-00000000.npy    mean and std of its latent, (2C, S, S) fp32; not for pixels
#   vae-sd/dataset.json                       as that of the images, for the latents
# dataset.json is written last, so that a folder without one is not complete.
PNG = "{:05d}/img{:08d}.png"
NPY = "{:05d}/img-mean-std-{:08d}.npy"
VAE_ENCODER = "stabilityai/sd-vae-ft-mse"
VAE_DECODER = "stabilityai/sd-vae-ft-ema"
VAE_SCALE = 0.18215


def to_rgb(image):
    """A PIL image -> RGB, turned by its EXIF orientation (which ADM does not do).

    Raises UserError for images of more than 8 bits, which Pillow would clip.
    """
    if image.mode[0] in "IF":
        raise UserError(f"an image of mode {image.mode} has more than 8 bits: convert it")
    return ImageOps.exif_transpose(image).convert("RGB")


def center_crop(image, size):
    """ADM's crop of a PIL image: halve with BOX while possible, then BICUBIC, then cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(scale * image.width), round(scale * image.height)), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Data(Dataset):
    """A prepared dataset: data[i] is {"index", "y", "moments" (2C, S, S), "image" (3, R, R) uint8}.

    moments are there if the dataset has latents. The image is there if with_images is set, as the training
    loop does in phase I, or if the model learns pixels.
    """

    def __init__(self, folder):
        self.images = Path(folder, "images")
        self.latents = Path(folder, "vae-sd")
        if not self.latents.is_dir():
            # Without latents, the model learns pixels.
            self.latents = None
        listing = (self.latents or self.images) / "dataset.json"
        if not listing.is_file():
            raise UserError(f"{listing} does not exist, so {folder} is not a prepared dataset, or not a "
                            f"complete one: run --prepare IMAGES --data-dir {folder}")
        metadata = json.loads(listing.read_text())
        labels = dict(metadata["labels"])
        # The names of the files, and of each its label.
        self.names = sorted(labels)
        self.labels = [labels[name] for name in self.names]
        present = sorted(set(self.labels))
        if present != list(range(len(present))):
            raise UserError(f"{listing}: labels must be 0 to K - 1 without gaps; it has {present[:5]} ... "
                            f"{present[-1]}")
        self.classes = metadata.get("classes") or [str(label) for label in present]
        # {name: texts}, for an MMDiT.
        self.captions = metadata.get("captions")
        # The VAE that made the latents; REPA's listings do not name it.
        self.vae = metadata.get("vae", VAE_ENCODER) if self.latents else None
        self.scale = metadata.get("scale", VAE_SCALE) if self.latents else 1.0

        # Images and latents are paired by their sorted listings, as REPA pairs them.
        self.image_names = self.names
        image_listing = self.images / "dataset.json"
        if self.latents and image_listing.is_file():
            image_labels = dict(json.loads(image_listing.read_text())["labels"])
            self.image_names = sorted(image_labels)
            if [image_labels[name] for name in self.image_names] != self.labels:
                raise UserError(f"{image_listing} and {listing} do not list the same items: their labels "
                                f"differ in number or order")
        self.with_images = False
        first = self[0]
        # The shape of a clean sample x0.
        if self.latents:
            channels, *size = first["moments"].shape
            self.shape = (channels // 2, *size)
        else:
            self.shape = tuple(first["image"].shape)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        item = {"index": i, "y": self.labels[i]}
        if self.latents:
            path = self.latents / self.names[i]
            with user_error(f"{path} cannot be read"):
                moments = torch.from_numpy(np.load(path)).float()
            _, std = moments.chunk(2)
            if not moments.isfinite().all() or std.min() < 0:
                raise UserError(f"{path} must hold mean and std: they must be finite, and std not negative, "
                                f"as its logarithm is")
            item["moments"] = moments
        if self.with_images or not self.latents:
            path = self.images / self.image_names[i]
            with user_error(f"{path} cannot be read"), Image.open(path) as image:
                item["image"] = pil_to_tensor(to_rgb(image))
        return item

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
        # The null label is the last row of LabelEmbedder.
        return torch.where(u < cfg_prob, len(self.classes), items["y"])


def to_device(items):
    return {key: x.to(DEVICE, non_blocking=True) for key, x in items.items()}


# A step's randomness is a function of (seed, step, position in the global batch). A resumed run, or one on
# another number of processes, sees the same images in the same order, with the same times and noise.

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


class Crops(Dataset):
    """Crops images, given as paths, and writes them as PNGs; crops[i] is (i, uint8 (3, size, size)).

    An image that cannot be read is named and skipped: crops[i] is None.
    """

    def __init__(self, paths, folder, size):
        self.paths = paths
        self.folder = folder
        self.size = size

    def __getitem__(self, i):
        try:
            with Image.open(self.paths[i]) as image:
                crop = center_crop(to_rgb(image), self.size)
        except Exception as e:      # a damaged file can make Pillow raise any exception
            print(f"skipping {self.paths[i]} ({type(e).__name__}: {e})", file=sys.stderr)
            return None
        with atomic_write(self.folder / PNG.format(i // 1000, i)) as f:
            # Level 1 takes 5 ms for 256 x 256 pixels, the default 18 ms.
            crop.save(f, "PNG", compress_level=1)
        return i, pil_to_tensor(crop)

    @staticmethod
    def collate(items):
        return [item for item in items if item]


def list_source(args):
    """(paths, labels, classes, captions of each image or None) of the images that --prepare is to crop."""
    source = Path(args.prepare)
    if args.captions:
        paths, captions = read_coco(args.captions[0], source)
        return paths, [0] * len(paths), [source.name], captions
    with user_error(f"--prepare {source} must name a folder with one folder of images for each class"):
        folder = ImageFolder(source)
    paths, labels = zip(*folder.samples)
    return paths, labels, folder.classes, None


@torch.no_grad()
def prepare(args):
    """--prepare: turns a tree of class folders, or COCO's images and captions, into a dataset at --data-dir.

    Each file gets its name when it is complete, dataset.json comes last, and the same command resumes.
    """
    join_processes()
    out = Path(args.data_dir)
    paths, labels, classes, captions = list_source(args)
    print0(f"{len(paths):,} images; classes from 0: {', '.join(classes[:12])}")
    vae = None
    if args.vae != "none":
        with first_process_first():
            vae = load_vae(args.vae or VAE_ENCODER)
    metadata = {"classes": classes, "vae": args.vae or VAE_ENCODER,
                "scale": vae.config.scaling_factor if vae else 1.0}

    # --- images of two kinds are not mixed in one folder
    relative = [Path(path).relative_to(args.prepare).as_posix() for path in paths]
    settings = {"images": zlib.crc32(json.dumps([relative, labels, captions]).encode()),
                "resolution": args.resolution, "vae": checksum(vae.state_dict()) if vae else None}
    record = out / "prepare.json"
    if RANK == 0 and not record.exists():
        with atomic_write(record) as f:
            f.write(json.dumps(settings).encode())
    barrier()
    if json.loads(record.read_text()) != settings:
        raise UserError(f"{out} was begun with other images, another --resolution or another --vae: name "
                        f"another --data-dir")

    # --- images and latents that are still missing; what is written last tells whether an image is done
    folder, template = ("vae-sd", NPY) if vae else ("images", PNG)
    targets = [out / folder / template.format(i // 1000, i) for i in range(len(paths))]
    missing = [i for i, target in enumerate(targets) if not target.is_file()]
    # All processes have looked before one writes.
    barrier()
    loader = DataLoader(Crops(paths, out / "images", args.resolution), batch_size=32,
                        sampler=missing[RANK::WORLD_SIZE], num_workers=args.num_workers,
                        collate_fn=Crops.collate)
    for crops in tqdm(loader, "preparing", disable=RANK > 0 or not missing):
        if vae and crops:
            pixels = torch.stack([crop for _, crop in crops]).to(DEVICE) / 127.5 - 1
            latent = vae.encode(pixels).latent_dist
            moments = torch.cat([latent.mean, latent.std], dim=1).cpu().numpy()
            for (i, _), x in zip(crops, moments):
                with atomic_write(targets[i]) as f:
                    np.save(f, x)
    barrier()

    # --- dataset.json, of the images and then of the latents
    if RANK > 0:
        return
    done = [i for i, target in enumerate(targets) if target.is_file()]
    for folder, template in (("images", PNG), ("vae-sd", NPY))[:2 if vae else 1]:
        names = {i: template.format(i // 1000, i) for i in done}
        metadata["labels"] = [[names[i], labels[i]] for i in done]
        if captions:
            metadata["captions"] = {names[i]: captions[i] for i in done}
        with atomic_write(out / folder / "dataset.json") as f:
            f.write(json.dumps(metadata).encode())
    print0(f"{out}: {len(done):,} images; {len(paths) - len(done)} could not be read")


# ---- 7. Processes, models, files ---------------------------------------------------------------------------

def print0(*text):
    """Prints on the first process only."""
    if RANK == 0:
        print(*text, flush=True)


def join_processes():
    """Joins torchrun's processes. On a GPU, fp32 is multiplied in TF32 from here on."""
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")


def autocast(precision):
    """The context in which modules compute in "bf16" or "fp16"; in "fp32" it changes nothing."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    return torch.autocast(DEVICE.type, dtype, enabled=dtype is not None)


def any_process(flag):
    """True if `flag` is set on any process. Synchronises the processes, not the GPUs."""
    if WORLD_SIZE == 1:
        return bool(flag)
    flags = torch.tensor(int(bool(flag)))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def barrier():
    """Returns when all processes have come here."""
    any_process(False)


@contextmanager
def first_process_first():
    """Rank 0 enters first, then the first process of each node, then the others: downloads happen once."""
    turn = 2
    if LOCAL_RANK == 0:
        turn = 1
    if RANK == 0:
        turn = 0
    # All processes pass two barriers, after the first and after the second turn.
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()


def check_same(facts):
    """Raises UserError if the processes do not agree on `facts`, a text."""
    if WORLD_SIZE > 1:
        found = [None] * WORLD_SIZE
        dist.all_gather_object(found, facts)
        if len(set(found)) > 1:
            raise UserError("the processes see different checkpoints, flags or data: --output-dir and "
                            "--data-dir must be the same everywhere, the former on a disk that all share")


# Clusters send these before they end a job; a terminal sends SIGINT for Ctrl-C, and SIGHUP when it is closed.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
                if hasattr(signal, name)]


@contextmanager
def catch_stop_signals():
    """Inside, stop signals are added to the list that this yields, and nothing else happens."""
    caught = []

    def handle(number, frame):
        # torchrun passes a terminal's Ctrl-C on, as an echo. After 5 seconds, another one ends the program.
        if number == signal.SIGINT and caught and time.monotonic() - caught[0] > 5:
            raise KeyboardInterrupt
        caught.append(time.monotonic())
        if RANK == 0 and len(caught) == 1:
            # The terminal may be gone, or a tee, which the same Ctrl-C ends.
            with suppress(OSError):
                # Unlike print, this may be called at any instant.
                os.write(2, b"\nstopping: a checkpoint is saved after this step\n")

    # nohup ignores SIGHUP, and it stays ignored.
    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS
              if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker):
    """Makes a loader process ignore stop signals; the main process ends it, by SIGTERM if need be."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def atomic_write(path):
    """Opens a temporary file that gets the name `path` when it is complete."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as f:
            yield f
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def lock_folder(folder):
    """Keeps other runs out of a folder for as long as the file that this returns is open."""
    file = open(folder / ".lock", "w")
    try:
        # Windows has no fcntl, and some network disks have no locks; there, runs are not kept apart.
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another program is writing to {folder}: wait, or name another --exp-name")
    except (ImportError, OSError) as e:
        print0(f"note: {folder} cannot be locked against a second run ({e})")
    return file


def checksum(state):
    """A number that differs if any weight of a state dict does."""
    crc = 0
    for x in state.values():
        crc = zlib.crc32(x.cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


def parse_name(name):
    """(class, Config, patch size) of a model's name. Raises UserError."""
    if name == "MMDiT":
        return MMDiT, CONFIGS[name], 2
    match = re.fullmatch("(SiT|DiT)-(XS|S|B|L|XL)/([248])", name)
    if not match:
        raise UserError(f"unknown model {name}: choose SiT- or DiT-{{XS,S,B,L,XL}}/{{2,4,8}}, or MMDiT")
    family, size, patch = match.groups()
    return {"SiT": SiT, "DiT": DiT}[family], CONFIGS[size], int(patch)


def build_model(name, **sizes):
    """The model of that name; sizes are arguments of its class, and override those of CONFIGS."""
    model_class, config, patch = parse_name(name)
    arguments = {
        "patch_size": patch, "depth": config.depth, "hidden_size": config.hidden_size,
        "num_heads": config.num_heads, "attention_blocks": config.attention_blocks,
        "feature_block": config.feature_block, "projector_dim": config.projector_dim}
    return model_class(**arguments | sizes)


def read_checkpoint(path, name=None):
    """A checkpoint of ours, of HASTE, REPA, SiT or DiT, or a bare state dict -> a dictionary with "model",
    "ema", "args" and what else it has.

    Nothing is unpickled that could run code. `name` is used if the checkpoint does not name its model.
    """
    with user_error(f"{path} cannot be read as a checkpoint"), \
            torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    args = saved.get("args") or {}
    args = dict(args if isinstance(args, dict) else vars(args))
    args["model"] = args.get("model") or name
    if not args["model"]:
        raise UserError(f"{path} does not name its model: use --model, such as --model SiT-XL/2")
    model = saved.get("model") or saved.get("ema") or saved
    result = {"model": model, "ema": saved.get("ema") or model}
    for key, state in result.items():
        # The prefixes of DDP and of torch.compile.
        state = {re.sub(r"^module\.|_orig_mod\.", "", k): x for k, x in state.items()}
        # SiT's own weights have 2C outputs for C channels.
        channels, patch, _ = state["x_embedder.proj.weight"].shape[1:]
        outputs = len(state["final_layer.linear.bias"]) // patch ** 2
        if args["model"].startswith("SiT") and outputs == 2 * channels:
            convert_sit(state)
            args["guided_channels"] = 3
        result[key] = state
    return saved | result | {"args": args}


def convert_sit(state):
    """Converts weights of SiT's own convention, in place and exactly.

    SiT has 2C output channels, of which it uses the first C, and its time runs from noise (0) to data (1), so
    that our v(x, t) is -SiT(x, 1 - t). As cos((1 - t) w) = cos w cos(t w) + sin w sin(t w), and likewise the
    sine, the other time is a rotation of the timestep embedding's first layer. SiT guides three channels.
    """
    channels, patch, _ = state["x_embedder.proj.weight"].shape[1:]
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        outputs = state[key].unflatten(0, (patch ** 2, -1))     # (patch^2, 2C, ...)
        state[key] = -outputs[:, :channels].flatten(0, 1)
    w = frequencies().double()
    of_cos, of_sin = state["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)
    rotated = [of_cos * w.cos() + of_sin * w.sin(), of_cos * w.sin() - of_sin * w.cos()]
    state["t_embedder.mlp.0.weight"] = torch.cat(rotated, dim=1).float()


def load_state(model, state, path):
    """Loads weights -> True if they have a projector that fits; otherwise the model's stays as it is."""
    own = {key: x for key, x in model.state_dict().items() if key.startswith("projectors.")}
    fits = all(key in state and state[key].shape == x.shape for key, x in own.items())
    if not fits:
        state = {key: x for key, x in state.items() if not key.startswith("projectors.")} | own
    with user_error(f"{path} is of another model or dataset: name the right --model and --data-dir, or "
                    f"another --exp-name"):
        model.load_state_dict(state)
    return fits


def load_ema(path, name=None):
    """(EMA model in eval mode, the run's args) of a checkpoint, or of the newest one in a run's folder.

    Width, depth and heads are those of the model's name; other sizes are those of the weights.
    """
    if Path(path).is_dir():
        path = newest_checkpoint(Path(path, "checkpoints")) or path
    saved = read_checkpoint(path, name)
    args = saved["args"]
    state = saved["ema"]
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1]) * patch
    sizes = {"input_size": side, "in_channels": channels}
    if "y_embedder.embedding_table.weight" in state:
        sizes["num_classes"] = len(state["y_embedder.embedding_table.weight"]) - 1
    model = build_model(args["model"], **sizes)
    load_state(model, state, path)
    model.can_be_guided = args.get("cfg_prob") != 0
    model.guided_channels = args.get("guided_channels", model.guided_channels)
    # Other people's latents are those of Stable Diffusion's VAE.
    if "scale" not in args:
        args |= {"vae": VAE_ENCODER, "scale": VAE_SCALE}
    return model.to(DEVICE).eval(), args


def newest_checkpoint(folder):
    """The path of the newest checkpoint that is whole, or None. Its name is its step, such as 0050000.pt."""
    paths = [path for path in folder.glob("*.pt") if path.stem.isdecimal()]
    for path in sorted(paths, key=lambda path: int(path.stem), reverse=True):
        # A zip's index is at its end, so that a file that was cut off is none.
        if zipfile.is_zipfile(path):
            return path
        print0(f"warning: {path} is damaged, and is not used")
    if paths:
        raise UserError(f"all checkpoints in {folder} are damaged: name another --exp-name to start over")


@cache
def load_vae(name):
    """diffusers' AutoencoderKL, frozen. Raises UserError if diffusers or weights are missing."""
    with user_error(f"--vae {name} could not be loaded: it is a name or a folder of diffusers' AutoencoderKL "
                    f"(pip install diffusers); --prepare also takes --vae none, for pixels"):
        from diffusers import AutoencoderKL
        vae = AutoencoderKL.from_pretrained(name)
    return vae.to(DEVICE).eval().requires_grad_(False)


def load_decoder(encoder, name=None):
    """The VAE that decodes what the VAE `encoder` encoded, or the one called `name`; None for pixels."""
    if not encoder:
        return None
    return load_vae(name or (VAE_DECODER if encoder == VAE_ENCODER else encoder))


def to_images(x0, vae, scale):
    """x0 (B, C, S, S) -> uint8 (B, 3, R, R): 255 (x + 1) / 2, clamped and truncated, the paper's protocol."""
    x = x0.float()
    if vae:
        x = torch.cat([vae.decode(part).sample for part in (x / scale).split(16)])
    if not x.isfinite().all():
        raise UserError("the samples are not finite: the weights are bad, or --precision fp16 overflowed")
    return (255 * (x + 1) / 2).clamp(0, 255).to(torch.uint8)


# ---- 8. Training -------------------------------------------------------------------------------------------

# The run ends after this many steps in a row whose gradients were not finite.
MAX_SKIPPED = 50
# After so many seconds without a batch, a loader process is taken for dead.
LOADER_TIMEOUT = 300


def default_precision():
    if DEVICE.type == "cpu":
        return "fp32"
    # Where bf16 is emulated it is slower than fp32.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def fill_defaults(args, data):
    """Fills in what the machine, the model's row of CONFIGS and the dataset decide."""
    args.model = args.model or DEFAULT_MODEL
    args.exp_name = args.exp_name or args.model.replace("/", "-")
    _, config, patch = parse_name(args.model)
    args.attention_blocks = tuple(args.attention_blocks or config.attention_blocks)
    args.teacher_blocks = tuple(args.teacher_blocks or config.teacher_blocks)
    args.encoder_depth = args.encoder_depth or config.feature_block
    args.grid = data.shape[1] // patch
    if args.tau is None:
        at_512_px = args.model == "SiT-XL/2" and args.grid == 32
        args.tau = 300_000 if at_512_px else config.tau
    args.precision = args.precision or default_precision()
    if args.cfg_prob == 0:
        # Without label dropout there is no guidance, nor in the run's grids.
        args.cfg_scale = 1.0
    initial = args.ema_decay ** args.max_train_steps
    if initial > 0.1:
        print0(f"note: at the end, {initial:.0%} of the EMA will be the initial weights, so that samples may "
               f"be noise: train longer, or with a lower --ema-decay")

    # What follows would run, and train something else.
    parts = WORLD_SIZE * args.gradient_accumulation_steps
    if args.batch_size % parts:
        raise UserError(f"--batch-size {args.batch_size} must divide into {parts} equal parts")
    if args.tau == "auto" and args.tau_from >= args.max_train_steps:
        raise UserError(f"--tau auto measures first at step {args.tau_from}, and the run ends at "
                        f"{args.max_train_steps}: use a lower --tau-from")


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
    """Starts or resumes the run of that name at Weights & Biases."""
    with user_error(f"--wandb {args.wandb} failed; it needs pip install wandb, and wandb login"):
        import wandb
        name = re.sub(r"\W", "-", args.exp_name)
        wandb.init(project=args.wandb, id=name, resume="allow", config=vars(args))


class Meter:
    """Means, speed and memory since the last line of metrics.jsonl, over all processes."""

    def __init__(self):
        # Of each step {name: scalar}; a step whose grad_norm is not finite was skipped.
        self.steps = []
        self.skipped_in_a_row = 0
        self.started = time.perf_counter()

    def check_skipped(self):
        """Raises UserError after MAX_SKIPPED steps in a row without a finite gradient."""
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(f"no finite gradient in {MAX_SKIPPED} steps in a row: use --precision fp32, or a "
                            f"lower --learning-rate")

    @contextmanager
    def paused(self):
        """What runs inside, such as saving a checkpoint, does not count as training."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused

    def finish_line(self, batch_size):
        """A line of the log, {name: number}, of the steps since the last one."""
        names = list(self.steps[0])
        table = torch.stack([torch.stack(list(values.values())) for values in self.steps])
        if WORLD_SIZE > 1:
            dist.all_reduce(table)
        # CPU-GPU sync point, once for each line of the log.
        table = table.cpu() / WORLD_SIZE
        taken = table[:, names.index("grad_norm")].isfinite()
        for ok in taken.tolist():
            self.skipped_in_a_row = 0 if ok else self.skipped_in_a_row + 1
        line = dict(zip(names, table[taken].mean(0).tolist())) if taken.any() else {}
        line["skipped_steps"] = int((~taken).sum())
        line["images_per_sec"] = batch_size * len(table) / (time.perf_counter() - self.started)
        if DEVICE.type == "cuda":
            line["gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
            torch.cuda.reset_peak_memory_stats()
        self.steps = []
        self.started = time.perf_counter()
        return line


def restore(saved, path, args, model, ema, optimizer, scaler):
    """Loads a checkpoint into a run, and names the flags that are new from now on."""
    for name, value in vars(args).items():
        if saved["args"].get(name, value) != value:
            print0(f"note: {name} was {saved['args'][name]} until now, and is {value} from now on")
    load_state(ema, saved["ema"], path)
    if load_state(model, saved["model"], path) and saved.get("opt"):
        # The learning rate is this command's, and REPA's optimizer is not fused.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(saved["opt"] | {"param_groups": groups})
    else:
        print0(f"{path} has no optimizer for this run's projector: the optimizer's state starts from 0")
    if saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])


def remove_what_is_repeated(run, step):
    """Removes the lines after `step` from metrics.jsonl, and the part of a file that a killed save left."""
    for part in run.glob("checkpoints/*.part"):
        part.unlink()
    path = run / "metrics.jsonl"
    if path.is_file():
        # The last line may have been cut off.
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        with atomic_write(path) as f:
            f.write("".join(kept).encode())


def load_batches(data, args, rows, steps):
    """An iterator over the batches of these steps, of which this process gets these rows."""
    loader = DataLoader(
        data, num_workers=args.num_workers, worker_init_fn=ignore_stop_signals,
        batch_sampler=batch_indices(len(data), args.seed, args.batch_size, rows, steps),
        pin_memory=DEVICE.type == "cuda", timeout=LOADER_TIMEOUT if args.num_workers else 0)
    batches = iter(loader)
    if hasattr(signal, "SIGCHLD"):
        # Torch raises the error of a dead loader process in this signal's handler, at any line; without the
        # handler, next(batches) raises it.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches


def draw_samples(path, ema, run_args, args):
    """Draws a grid of a run; a picture is no reason to end it."""
    try:
        sample_grid(path, ema, run_args, args)
    except Exception as e:
        print0(f"\nwarning: {path} was not drawn ({e})")


def compile_blocks(model):
    """Compiles the blocks, which share a graph, and the loss of a pair of maps."""
    global pair_loss
    # Otherwise each block's graph would be cut into parts, at DDP's buckets of gradients.
    torch._dynamo.config.optimize_ddp = False
    for block in model.blocks:
        block.compile(dynamic=False)
    pair_loss = torch.compile(pair_loss, dynamic=False)


def train(args):
    """Trains args.model on args.data_dir to step args.max_train_steps, from the newest checkpoint.

    Returns the exit code: 0, or 75 (start me again) if a signal ended it before.
    """
    # --- processes, data, the run's newest checkpoint, whose name is its step
    join_processes()
    data = Data(args.data_dir)
    fill_defaults(args, data)
    run = Path(args.output_dir, args.exp_name)
    if RANK == 0:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        # It is held until this function returns.
        lock = lock_folder(run)
    barrier()
    newest = newest_checkpoint(run / "checkpoints")
    saved = read_checkpoint(newest, args.model) if newest else {}
    step = int(newest.stem) if newest else 0
    last_step = args.max_train_steps
    check_same(f"{step} {vars(args)} {len(data)} {zlib.crc32(str(data.labels).encode())}")

    # --- tau: phase II begins after this step
    tau = args.tau
    if tau in ("never", "auto"):
        tau = math.inf
    if args.tau == "auto" and saved.get("tau") is not None:
        # The trigger has fired before.
        tau = saved["tau"]

    # --- how a global batch is shared: this process's rows of it, of which it takes a part at a time
    local_batch_size = args.batch_size // WORLD_SIZE
    micro_batch_size = local_batch_size // args.gradient_accumulation_steps
    rows = slice(RANK * local_batch_size, (RANK + 1) * local_batch_size)

    # --- the teacher
    teacher = None
    teacher_dim = 768
    if "projectors.0.4.bias" in saved.get("model", {}):
        teacher_dim = len(saved["model"]["projectors.0.4.bias"])
    with first_process_first():
        if step < min(tau, last_step):
            teacher_blocks = args.teacher_blocks if args.lambda_a > 0 else ()
            teacher = load_teacher(args.teacher, args.grid, teacher_blocks).to(DEVICE)
            teacher_dim = teacher.vit.embed_dim

    # --- the student, its EMA, the optimizer; all processes start from the same weights
    torch.manual_seed(args.seed)
    model = build_model(
        args.model, input_size=data.shape[1], in_channels=data.shape[0], num_classes=len(data.classes),
        teacher_dim=teacher_dim, attention_blocks=args.attention_blocks, feature_block=args.encoder_depth)
    model.to(DEVICE)
    model.can_be_guided = args.cfg_prob > 0
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    update_ema = get_ema_multi_avg_fn(args.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.0, fused=True)
    # Loss scaling, for fp16 alone; elsewhere its methods pass everything through.
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=args.precision == "fp16")
    if saved:
        restore(saved, newest, args, model, ema, optimizer, scaler)
    # A stop leaves a checkpoint, which goes when a newer one is complete.
    left_by_stop = newest if saved.get("stopped") else None
    # Free its memory: a checkpoint is as large as model, EMA and optimizer together.
    saved = None
    if args.compile:
        compile_blocks(model)

    # --- what the first process writes
    run_args = vars(args) | {"vae": data.vae, "scale": data.scale, "classes": data.classes}
    if RANK == 0:
        remove_what_is_repeated(run, step)
        if args.wandb:
            start_wandb(args)
    kind = "latents" if data.latents else "pixels"
    print0(f"{run}: {args.model} on {len(data):,} {kind} of shape {data.shape}, {args.precision}, "
           f"{WORLD_SIZE} x {DEVICE.type}, tau {args.tau}, from step {step}")

    def save(stopped=False):
        nonlocal left_by_stop
        state = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict(),
                 "scaler": scaler.state_dict(), "args": run_args, "steps": step, "stopped": stopped,
                 "tau": tau if args.tau == "auto" and tau <= step else None}
        path = run / f"checkpoints/{step:07d}.pt"
        with atomic_write(path) as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if left_by_stop and left_by_stop != path:
            left_by_stop.unlink(missing_ok=True)
        left_by_stop = path if stopped else None

    # --- the two phases; at tau, everything of phase I is dropped at once
    weights = loss_weights(args)
    meter = Meter()
    error = None
    with catch_stop_signals() as stop_signals, \
            tqdm(total=last_step, initial=step, disable=RANK > 0, dynamic_ncols=True) as bar:
        for aligned in (True, False):
            phase_end = min(tau, last_step) if aligned else last_step
            if step >= phase_end:
                continue
            data.with_images = aligned
            # DDP waits for the gradient of each weight that requires one; an unused projector gets none.
            model.projectors.requires_grad_(aligned and args.lambda_r > 0)
            net = model
            if WORLD_SIZE > 1:
                net = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            batches = load_batches(data, args, rows, range(step, phase_end))
            bar.set_description("phase I" if aligned else "phase II")

            while step < phase_end:
                # --- the next items of data
                try:
                    meter.check_skipped()
                    items = next(batches)
                except Exception as e:      # save first, and then say why
                    error = e
                # No process has begun the step yet, so that all can stop here if one of them has to.
                if any_process(error or stop_signals):
                    break
                bar.update()

                # --- the batch: clean samples, conditions, times and noise
                items = to_device(items)
                t, u, eps, xi = [x[rows] for x in randomness(args.batch_size, data.shape, args.seed, step)]
                x0 = data.x0(items, xi)
                y = data.condition(items, u, args.cfg_prob)

                # --- teacher, while step < tau; forward; backward; in parts if memory is short
                means = {}
                for start in range(0, local_batch_size, micro_batch_size):
                    i = slice(start, start + micro_batch_size)
                    if WORLD_SIZE > 1:
                        # Gradients are averaged over the processes in the last part's backward pass.
                        net.require_backward_grad_sync = i.stop == local_batch_size
                    target = None
                    with autocast(args.precision):
                        if aligned:
                            target = teacher(items["image"][i])
                        terms = losses(net, model.diffusion, x0[i], eps[i], t[i], y[i], target, weights)
                    loss = objective(terms, weights)
                    share = micro_batch_size / local_batch_size
                    scaler.scale(share * loss).backward()
                    values = {"loss": loss} | {f"loss_{name}": x for name, x in terms.items()}
                    for name, x in values.items():
                        means[name] = means.get(name, 0) + share * x.detach()

                # --- step; if any gradient is not finite, every process skips it
                scaler.unscale_(optimizer)
                max_norm = args.max_grad_norm if args.max_grad_norm > 0 else math.inf
                means["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                # torch's fused optimizers skip the step if this is 1. In fp16, the scaler sets it, too.
                optimizer.found_inf = (~means["grad_norm"].isfinite()).float()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                update_ema(list(ema.parameters()), list(model.parameters()), step)
                step += 1
                meter.steps.append(means)

                # --- the trigger: is it time for phase II?
                if aligned and trigger_is_due(step, args):
                    with meter.paused():
                        # In fp32, half of a batch takes the memory of a whole one in bf16.
                        size = max(1, micro_batch_size // 2)
                        cosines = measure_cosines(model, teacher, data, args, step, size)
                    cosine = sum(cosines) / len(cosines)
                    log(run, args, step=step, cosine=cosine, cosines=cosines)
                    if trigger_fires(cosine, args):
                        tau = phase_end = step
                        print0(f"\nstep {step}: the mean cosine is {cosine:.4f}: tau is {step}")

                # --- log, checkpoint, samples
                phase_ends = step == phase_end
                if step % args.log_every == 0 or phase_ends:
                    line = meter.finish_line(args.batch_size)
                    log(run, args, step=step, phase=1 if aligned else 2, **line)
                    # It is shown with the next step, if the terminal is still there.
                    bar.set_postfix({key: f"{x:.4g}" for key, x in line.items()}, refresh=False)
                saving = step % args.checkpointing_steps == 0 or phase_ends
                sampling = args.sampling_steps > 0 and (step % args.sampling_steps == 0 or phase_ends)
                with meter.paused():
                    if RANK == 0 and saving:
                        save()
                    if RANK == 0 and sampling:
                        draw_samples(run / f"samples/{step:07d}.png", ema, run_args, args)
                if phase_ends and step < last_step:
                    print0(f"\nstep {step} is tau: phase II begins, without alignment; {run}/checkpoints has "
                           f"{step:07d}.pt")

            # Here end phase I's loader processes and the teacher; DDP, with Python's next garbage collection.
            batches = net = teacher = None
            if step < phase_end:
                break

        # --- stopped, by a signal or because the data failed: save what there is
        if RANK == 0 and not (run / f"checkpoints/{step:07d}.pt").is_file():
            save(stopped=True)
        # All wait until the first process has saved.
        barrier()
    # Signals that end a step of a cluster's job end its loader processes, too.
    if error and not stop_signals:
        raise error
    if step < last_step:
        print0(f"{run}: stopped after step {step}; the same command resumes")
        # EX_TEMPFAIL: start me again.
        return 75
    print0(f"{run}: finished at step {step}; see python haste.py --sample {run}")
    return 0


# ---- 9. Sampling -------------------------------------------------------------------------------------------

def seeded_noise(model, n, seed):
    """n starting points of a sampler, (n, C, S, S)."""
    shape = (n, model.in_channels, model.input_size, model.input_size)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE)


def grid_conditions(model, run_args, args):
    """The names of what --labels or --captions ask for, and the conditions y."""
    if isinstance(model, MMDiT):
        names = args.captions or ["a red bus"]
        return names, encode_captions(names)
    classes = run_args.get("classes") or [""] * model.num_classes
    labels = args.labels or list(range(min(8, len(classes))))
    if max(labels) >= len(classes):
        # The row after the last class is the null label, which draws anything.
        raise UserError(f"--labels {max(labels)}: the classes are 0 to {len(classes) - 1}")
    names = [f"{label} {classes[label]}" for label in labels]
    return names, torch.tensor(labels, device=DEVICE)


def sample_grid(path, model, run_args, args):
    """Draws args.labels or args.captions as one PNG -> their names. run_args: of the model's run."""
    vae = load_decoder(run_args["vae"], args.vae)
    names, y = grid_conditions(model, run_args, args)
    noise = seeded_noise(model, len(y), args.seed)
    interval = (args.guidance_low, args.guidance_high)
    # Another seed, so that the SDE does not draw the starting noise once more.
    torch.manual_seed(args.seed + 1)
    with autocast(args.precision):
        x = sample(model, noise, y, args.num_steps, args.cfg_scale, interval, args.mode)
    images = to_images(x, vae, run_args["scale"]) / 255
    # Small pictures are enlarged, to be seen.
    images = F.interpolate(images, scale_factor=max(1, 128 // images.shape[-1]))
    with atomic_write(path) as f:
        save_image(images, f, "png", padding=1, pad_value=1)
    return names


def sample_from(args):
    """--sample: draws a grid from a checkpoint's EMA."""
    model, run_args = load_ema(args.sample, args.model)
    args.precision = args.precision or default_precision()
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

    All weights keep torch's default initialisation, as in the released code. num_classes is accepted as
    build_model's callers name it, and not used: captions take the place of classes.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=768, depth=24, num_heads=24,
                 num_classes=None, attention_blocks=(4, 5, 6, 7), feature_block=8,
                 teacher_dim=768, projector_dim=2048):
        super().__init__()
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
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
        self.projectors = nn.ModuleList()
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * in_channels)
        self.projectors.append(build_projector(hidden_size, projector_dim, teacher_dim))

    # The released weights call them joint_blocks; the trigger and --compile look for blocks, as in SiT.
    @property
    def blocks(self):
        return self.joint_blocks

    def forward(self, x, t, y, align=False):
        """As SiT.forward, with y (B, T, 768)."""
        x = self.x_embedder(x) + self.pos_embed
        text = self.context_embedder(y)
        c = self.t_embedder(t)
        tokens = []
        qk = []
        for block in self.joint_blocks:
            x, text, block_qk = block(x, text, c)
            if align:
                tokens.append(x)
                qk.append(block_qk)
        v = unpatchify(self.final_layer(x, c), self.patch_size)
        if not align:
            return v
        z = self.projectors[0](tokens[self.feature_block - 1])
        return v, z, [qk[i] for i in self.attention_blocks]

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
@torch.autocast(DEVICE.type, enabled=False)
def encode_captions(texts):
    """n texts -> the last hidden states of CLIP's text model, (n, 77, 768)."""
    tokenizer, model = load_clip()
    length = model.config.max_position_embeddings
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return model(ids.input_ids.to(DEVICE)).last_hidden_state


def read_coco(path, folder):
    """(paths in `folder`, texts of each) of the images that have captions in COCO's JSON."""
    with user_error(f"--captions {path} must be COCO's JSON file of captions"):
        coco = json.loads(Path(path).read_text())
        captions = {}
        for annotation in coco["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
        images = sorted((image["file_name"], image["id"]) for image in coco["images"])
    images = [(name, number) for name, number in images if number in captions]
    return [folder / name for name, _ in images], [captions[number] for _, number in images]


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


def new_parser(program):
    return argparse.ArgumentParser(program, formatter_class=HelpFormatter, allow_abbrev=False)


def count(text):
    """The type of flags that count something: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0")
    return int(text)


def step_never_or_auto(text):
    """The type of --tau."""
    return text if text in ("never", "auto") else count(text)


def add_sampler_flags(parser, cfg_scale):
    """The flags that --sample, the grids of a run and evaluate.py share."""
    add = parser.add_argument_group("sampler").add_argument
    add("--mode", choices=("sde", "ode", "heun", "ddpm"), default="sde",
        help="sde, ode or heun; a DiT has sde, or ddpm, its own")
    add("--num-steps", type=count, default=250, help="steps of the sampler")
    add("--cfg-scale", type=float, default=cfg_scale, help="guidance scale; 1 is no guidance")
    add("--guidance-low", type=float, default=0.0, help="guide if t is in [low, high]")
    add("--guidance-high", type=float, default=1.0, help="guide if t is in [low, high]")


def add_common_flags(parser, precision_help, precision=None):
    """The flags that haste.py and evaluate.py share."""
    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=count, default=0, help="seed of all randomness")
    add("--precision", choices=("bf16", "fp16", "fp32"), default=precision, help=precision_help)
    add("--compile", action="store_true", help="compile the model's blocks")
    add("--vae", help="an AutoencoderKL of diffusers, a name or a folder, that encodes for --prepare and "
                      "decodes samples; --prepare --vae none keeps pixels (default: Stable Diffusion's)")
    add("--num-workers", type=count, default=min(8, os.cpu_count()),
        help="loader processes for each process")


def parse_args(argv=None):
    """The values of haste.py's flags, which are named as in SiT, REPA and HASTE."""
    parser = new_parser("haste.py")
    group = parser.add_argument_group("what to do, if not to train")
    add = group.add_mutually_exclusive_group().add_argument
    add("--demo", action="store_true", help="everything on letters, offline; other flags go to its training")
    add("--prepare", metavar="IMAGES", help="turn this tree of class folders into a dataset at --data-dir")
    add("--sample", metavar="CHECKPOINT",
        help="draw --labels or --captions from the EMA of this checkpoint, or of a run's folder")
    add = group.add_argument
    add("--compare", action="store_true",
        help="plain, REPA, attention and HASTE side by side, on the demo's letters")
    add("--seeds", type=count, default=1, help="with --compare: runs of each of them, from --seed")

    add = parser.add_argument_group("data").add_argument
    add("--data-dir", default="data/imagenet256", help="a prepared dataset")
    add("--resolution", type=count, default=256,
        help="of the images that --prepare writes; training takes the dataset's")
    add("--captions", nargs="+", help="for --sample, the texts to draw; for --prepare, COCO's JSON file")

    add = parser.add_argument_group("alignment").add_argument
    add("--model", help=f"SiT- or DiT-[XS,S,B,L,XL]/[2,4,8], or MMDiT (default: {DEFAULT_MODEL})")
    add("--teacher", "--enc-type", default="dinov2_vitb14",
        help="dinov2_vit[s,b,l,g]14, also with _reg; a ViT of timm; or a file (see README)")
    add("--tau", "--early-stop-point", type=step_never_or_auto,
        help="the step at which alignment stops, never, or auto (default: the paper's for the model)")
    add("--tau-from", type=count, default=50_000, help="auto: the first measurement")
    add("--tau-every", type=count, default=10_000, help="auto: steps between measurements")
    add("--tau-images", type=count, default=2048, help="auto: images in a measurement")
    add("--tau-cosine", type=float, default=-0.05, help="auto: stop below it; -1 measures, and never stops")
    add("--lambda-r", "--proj-coeff", type=float, default=0.5, help="weight of L_REPA")
    add("--lambda-a", "--attn-coeff", type=float, default=0.5, help="weight of L_ATTA")
    add("--attention-blocks", type=count, nargs="+", help="the student's, from 0 (default: the paper's)")
    add("--teacher-blocks", type=count, nargs="+",
        help="their partners, from 0 to 11 for a teacher of 12 blocks (default: the paper's)")
    add("--encoder-depth", type=count,
        help="the block whose tokens are aligned, from 1 (default: the paper's)")

    add = parser.add_argument_group("training").add_argument
    add("--output-dir", default="runs", help="output folder of all runs")
    add("--exp-name", help="the run's folder in it (default: the model's name)")
    add("--batch-size", type=count, default=256, help="global batch, over all processes")
    add("--gradient-accumulation-steps", type=count, default=1, help="parts of a batch, to save memory")
    add("--max-train-steps", type=count, default=400_000, help="where training ends")
    add("--learning-rate", type=float, default=1e-4, help="of AdamW, constant")
    add("--max-grad-norm", type=float, default=1.0, help="clip gradients to this norm; 0 turns clipping off")
    add("--ema-decay", type=float, default=0.9999, help="of the weights that are sampled")
    add("--cfg-prob", type=float, default=0.1, help="label dropout, for guidance")
    add("--log-every", type=count, default=100, help="steps between lines of metrics.jsonl")
    add("--checkpointing-steps", type=count, default=50_000, help="steps between checkpoints")
    add("--sampling-steps", type=count, default=10_000,
        help="steps between grids of samples, which are also drawn at tau and at the end; 0 draws none")
    add("--wandb", metavar="PROJECT", help="log to this project of Weights & Biases, too")

    add = parser.add_argument_group("sampling").add_argument
    add("--labels", type=count, nargs="+",
        help="classes of --sample and of the grids (default: the first 8)")
    add("--out", default="samples.png", help="the picture that --sample writes")

    # 4.0 is for pictures to look at; evaluate.py, whose figures are to be compared, has no guidance.
    add_sampler_flags(parser, cfg_scale=4.0)
    add_common_flags(parser, "default: bf16 on a GPU that has it, else fp16; fp32 on a CPU")
    return parser.parse_args(argv)


@contextmanager
def exit_on_user_error():
    """Prints a UserError as one sentence, and ends the program with exit code 1."""
    try:
        yield
    except UserError as e:
        # A loader process puts its traceback before the sentence.
        sys.exit(f"error: {str(e).strip().splitlines()[-1]}")
    if dist.is_initialized():
        # On torch 2.6 the group's end can wait for gloo's thread while that waits for Python, to free the
        # tensors of the last messages. It takes them a moment.
        time.sleep(0.1)
        dist.destroy_process_group()


def main(argv=None):
    """Runs the command line `argv` -> its exit code. Ends with a sentence for a UserError."""
    args = parse_args(argv)
    with exit_on_user_error():
        if args.demo or args.compare:
            import evaluate
            return evaluate.demo(sys.argv[1:] if argv is None else argv)
        if args.prepare:
            return prepare(args)
        if args.sample:
            return sample_from(args)
        return train(args)


if __name__ == "__main__":
    # evaluate.py imports haste, and both must share one module.
    sys.modules["haste"] = sys.modules["__main__"]
    sys.exit(main())
