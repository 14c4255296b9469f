# SPDX-License-Identifier: MIT
"""What haste.py and evaluate.py promise, in the order of the files. Run: python -m pytest -q"""
import argparse
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import haste

HASTE = str(Path(haste.__file__).resolve())


# ---- Helpers: a tiny world ---------------------------------------------------------------------------------

TINY = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 4, "num_heads": 4,
        "num_classes": 5, "attention_blocks": (1, 2), "feature_block": 3, "teacher_dim": 24,
        "projector_dim": 16}


def tiny_sit(**sizes):
    torch.manual_seed(0)
    return haste.SiT(**TINY | sizes)


def awake(model):
    """The model with random weights where it starts at zero."""
    for p in model.parameters():
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.1)
    return model


def tiny_vit(**config):
    torch.manual_seed(0)
    return VisionTransformer(**{"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 12, "num_heads": 2,
                                "num_classes": 0} | config)


def words(**given):
    """Flags in words of the command line; True is a flag without a value."""
    values = {k: [] if v is True else v if isinstance(v, list) else [v] for k, v in given.items()}
    return [word for k, each in values.items() for word in (f"--{k.replace('_', '-')}", *map(str, each))]


def preparing(source, out, *more):
    """--prepare, to pixels of 8 x 8, in words of the command line; what comes later counts."""
    return ["--prepare", f"{source}", "--data-dir", f"{out}", "--resolution", "8", "--vae", "none",
            "--num-workers", "0", *map(str, more)]


def frozen(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def with_frozen_weights(model, no="nothing"):
    """The model with weights of numpy's streams, none for names that begin with `no`."""
    state = model.state_dict()
    for i, name in enumerate(sorted(n for n in state if not n.startswith(no))):
        if name != "pos_embed":
            state[name] = frozen(1000 + i, *state[name].shape) * (
                state[name][0].numel() ** -0.5 if state[name].ndim > 1 else 0.02)
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """40 coloured squares in 4 classes, 8 x 8, prepared as pixels, and a teacher of 12 blocks."""
    home, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    for i in range(40):
        folder = home / "images" / f"class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(folder / f"{i:02d}.png")
    haste.main(preparing(home / "images", home / "data"))
    config = dict(img_size=8, patch_size=2, embed_dim=24, depth=12, num_heads=2, num_classes=0)
    torch.save({"config": config, "model": tiny_vit().state_dict()}, home / "teacher.pt")
    return home


def flags(world, out, **more):
    """A run of 6 steps, 3 in each phase, in words of the command line."""
    given = dict(model="SiT-XS/2", data_dir=world / "data", teacher=world / "teacher.pt", output_dir=out,
                 exp_name="run", batch_size=8, max_train_steps=6, tau=3, checkpointing_steps=2, log_every=1,
                 sampling_steps=0, num_workers=0, learning_rate=1e-3)
    return words(**given | more)


def metrics(out, run="run"):
    return [json.loads(line) for line in (Path(out) / run / "metrics.jsonl").read_text().splitlines()]


def checkpoint(out, step, run="run"):
    return haste.load_file(Path(out) / run / "checkpoints" / f"{step:07d}.pt")


def same(a, b):
    """Whether two nests of dictionaries, lists and tensors agree to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def complaint(capsys, argv, code=2):
    """The one sentence on stderr that a mistake gets with exit code 2, and a fault with 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        haste.main([str(a) for a in argv])
    err = capsys.readouterr().err.strip()
    told = err[err.find("haste.py: "):]         # a progress bar may stand before it
    assert stop.value.code == code and told.startswith("haste.py: ") and "\n" not in told, err
    assert "Traceback" not in err, err
    return told


# ---- 1. The student ----------------------------------------------------------------------------------------

def test_the_released_codes_figures_for_the_same_weights():
    """Forward, losses, gradients and samplers give what the authors' code gives,
    executed on numpy's frozen streams."""
    model = haste.SiT(input_size=32, patch_size=2, in_channels=4, hidden_size=192, depth=10, num_heads=16,
                      num_classes=10, attention_blocks=(4, 5, 6, 7), feature_block=8, teacher_dim=48,
                      projector_dim=96)
    with_frozen_weights(model)

    x, eps, t = frozen(1, 2, 4, 32, 32), frozen(2, 2, 4, 32, 32), torch.tensor([0.3, 0.8])
    y = torch.tensor([3, 7])
    target = frozen(3, 2, 256, 48), [(frozen(40 + i, 2, 12, 256, 64), frozen(60 + i, 2, 12, 256, 64))
                                     for i in range(4)]
    diff, repa, atta = haste.losses(model, x, eps, t, y, target)
    (diff + 0.5 * repa + 0.5 * atta).backward()
    assert [diff.item(), repa.item(), atta.item()] == pytest.approx(
        [3.124647, -0.002397, 5.951766], rel=2e-4, abs=2e-5)
    grads = {"blocks.4.attn.qkv.weight": 0.640134, "blocks.7.attn.qkv.weight": 0.495325,
             "x_embedder.proj.weight": 0.376411, "projectors.0.0.weight": 0.047125,
             "final_layer.linear.weight": 2.75373}
    assert {n: dict(model.named_parameters())[n].grad.norm().item() for n in grads} == pytest.approx(
        grads, rel=2e-4)

    for mode, values, mean in (("ode", [-0.570364, 2.528501, 2.473564, 0.119391], 1.093669),
                               ("heun", [-0.494683, 2.502542, 2.412591, 0.107579], 1.086206),
                               ("sde", [0.613797, 1.507382, 0.466727, 0.038904], 0.921484)):
        drawn = iter(range(501, 600))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda a: frozen(next(drawn), *a.shape).to(a.dtype))
            out = haste.sample(model, frozen(9, 2, 4, 32, 32), y, steps=6, cfg_scale=1.8, guidance=(0.0, 0.7),
                               mode=mode)
        assert out[1, :, 20, 3].tolist() == pytest.approx(values, rel=2e-4, abs=2e-5), mode
        assert out.abs().mean().item() == pytest.approx(mean, rel=2e-4)


def test_parameter_counts_and_names_are_those_of_sit_and_repa():
    with torch.device("meta"):
        model = haste.build_model("SiT-XL/2")
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("projectors"))
    # SiT publishes its XL/2 with twice the output channels
    assert count == 675_129_632 - 16 * (1152 + 1)
    assert [n for n, _ in model.named_children()] == ["x_embedder", "t_embedder", "y_embedder", "blocks",
                                                      "projectors", "final_layer"]
    assert [n for n, _ in model.named_parameters()][0] == "pos_embed" and not model.pos_embed.requires_grad


def test_a_new_model_says_zero_and_each_block_is_the_identity():
    model = tiny_sit()
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 4])
    assert not model(x, t, y).any()
    h = torch.randn(2, 16, 32)
    assert torch.equal(model.blocks[0](h, torch.randn(2, 32))[0], h)


def test_patches_go_back_where_they_came_from():
    model = tiny_sit(in_channels=2)
    x = torch.arange(2 * 2 * 64.).reshape(2, 2, 8, 8)
    patches = F.unfold(x, 2, stride=2).reshape(2, 2, 4, 16).permute(0, 3, 2, 1)     # (B, N, p p, C)
    assert torch.equal(model.unpatchify(patches.reshape(2, 16, 8)), x)


@pytest.mark.parametrize("sizes", [dict(input_size=12, patch_size=4, in_channels=1, num_classes=2),
                                   dict(num_heads=2), {}])
def test_align_shows_projected_tokens_and_the_maps_that_attention_used(sizes):
    model = awake(tiny_sit(**sizes))
    seen = {}
    for b in model.attention_blocks:
        model.blocks[b].attn.register_forward_hook(
            lambda m, args, out, b=b: seen.update({b: (args[0], out[0])}))
    x, t = torch.randn(3, model.in_channels, model.input_size, model.input_size), torch.rand(3)
    y = torch.tensor([0, 1, 1])
    v, z, qk = model(x, t, y, align=True)
    assert torch.equal(v, model(x, t, y)) and v.shape == x.shape
    N = (model.input_size // model.patch_size) ** 2
    assert z.shape == (3, N, 24) and len(qk) == 2
    for b, (q, k) in zip(model.attention_blocks, qk):
        assert q.shape == k.shape == (3, model.blocks[b].attn.num_heads, N,
                                      32 // model.blocks[b].attn.num_heads)
        inside, out = seen[b]
        values = model.blocks[b].attn.qkv(inside)[..., 64:].reshape(3, N, q.shape[1], -1).transpose(1, 2)
        by_hand = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ values
        assert torch.allclose(model.blocks[b].attn.proj(by_hand.transpose(1, 2).reshape(3, N, 32)), out,
                              atol=1e-5)


def test_labels_are_dropped_at_the_rate_asked_for_to_the_models_own_null_label():
    embedder = tiny_sit(num_classes=7, class_dropout_prob=0.1).y_embedder
    labels = torch.arange(7).repeat(4000)
    dropped = embedder.drop(labels, torch.rand(len(labels), generator=torch.Generator().manual_seed(0)))
    assert set(dropped[dropped != labels].tolist()) == {7}
    assert (dropped == 7).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert len(embedder.embedding_table.weight) == 8 and tiny_sit(num_classes=7).null_label == 7


# ---- 2. The teacher ----------------------------------------------------------------------------------------

HUB = """
import torch
from timm.models.vision_transformer import VisionTransformer
dependencies = ["torch"]

class Dino(VisionTransformer):          # speaks as the hub's DINOv2 does
    set_input_size = property()         # which has no such method
    def forward_features(self, x):
        B = len(x)
        x = torch.cat([self.cls_token.expand(B, -1, -1), self.patch_embed(x)], 1) + self.pos_embed
        x = torch.cat([x[:, :1], self.registers.expand(B, -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return {"x_norm_patchtokens": self.norm(x)[:, 1 + self.registers.shape[1]:]}

def build(registers):
    torch.manual_seed(0)
    net = Dino(img_size=21, patch_size=3, embed_dim=24, depth=12, num_heads=2, num_classes=0)
    net.registers = torch.nn.Parameter(torch.randn(1, registers, 24))
    net.patch_embed.strict_img_size = False
    return net

def dinov2_vitb14(**kwargs): return build(0)
def dinov2_vitb14_reg(**kwargs): return build(4)
def dinov2_vits14(**kwargs): raise OSError("no route to the weights")
"""


@pytest.mark.parametrize("kind", ["hub", "hub with registers", "timm", "timm without class token"])
def test_the_hooks_show_the_maps_and_features_of_the_patches(kind, tmp_path):
    grid, blocks = 4, (7, 9, 11)
    if kind.startswith("hub"):
        (tmp_path / "hubconf.py").write_text(HUB)
        teacher = haste.load_teacher("dinov2_vitb14" + "_reg" * ("reg" in kind), grid, blocks,
                                     repo=str(tmp_path))
    else:
        extra = dict(class_token=False, global_pool="avg", fc_norm=False)
        extra = extra if "without" in kind else dict(reg_tokens=3)
        teacher = haste.Teacher(tiny_vit(img_size=14, **extra), blocks, grid)
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    inputs = []
    for b in blocks:
        teacher.vit.blocks[b].attn.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    features, qk = teacher(images)
    assert features.shape == (2, 16, 24) == (2, grid ** 2, teacher.dim) and len(qk) == 3
    for b, x, (q, k) in zip(blocks, inputs, qk):
        attention, prefix = teacher.vit.blocks[b].attn, x.shape[1] - 16
        q_all, k_all, _ = attention.qkv(x).reshape(2, -1, 3, 2, 12).permute(2, 0, 3, 1, 4)
        # the class and register rows and columns are cut here
        logits = (q_all @ k_all.mT)[:, :, prefix:, prefix:]
        assert torch.allclose(q @ k.mT, logits, atol=1e-6) and q.shape == (2, 2, 16, 12)
    tail = []
    teacher.vit.norm.register_forward_hook(lambda m, args, out: tail.append(out))
    assert torch.equal(teacher(images)[0], tail[-1][:, -16:])
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.vit.training
    assert not features.requires_grad


def test_the_teacher_sees_the_image_normalised_and_bicubic_on_the_students_grid():
    teacher = haste.Teacher(tiny_vit(img_size=12), (), 6)
    seen = []
    teacher.vit.patch_embed.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    teacher(images)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(seen[0], F.interpolate((images / 255 - mean) / std, (12, 12), mode="bicubic"),
                          atol=1e-5)


def test_blocks_named_for_12_keep_their_distance_from_the_last(tmp_path):
    config = dict(img_size=8, patch_size=2, embed_dim=24, depth=4, num_heads=2, num_classes=0)
    torch.save({"config": config, "model": tiny_vit(depth=4).state_dict()}, tmp_path / "t.pt")
    assert haste.load_teacher(str(tmp_path / "t.pt"), 4, (8, 9, 11)).blocks == [0, 1, 3]
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    _, qk = haste.load_teacher(str(tmp_path / "t.pt"), 4, (11, 11))(images)     # one block may teach two
    assert same(qk[0], qk[1])


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_medium_patch16_rope_reg1_gap_256",
                                  "beit_base_patch16_224"])
def test_a_network_that_would_show_other_maps_than_it_uses_cannot_teach(name):
    vit = haste.timm.create_model(name, num_classes=0, depth=2)
    with pytest.raises(haste.BadInput, match="cannot teach"):
        haste.Teacher(vit, (1,), 4)


def test_a_timm_teacher_sees_images_in_the_normalisation_it_was_trained_with(monkeypatch):
    vit, seen = tiny_vit(), []
    vit.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    vit.patch_embed.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    monkeypatch.setattr(haste.timm, "create_model", lambda name, **kw: vit)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    haste.load_teacher("timm/any", 4, (11,))(images)
    assert torch.allclose(seen[0], (images / 255 - 0.5) / 0.25, atol=1e-5)


# ---- 3. The losses -----------------------------------------------------------------------------------------

def test_feature_loss_is_the_mean_negative_cosine():
    z, y = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    naive = -sum(z[b, n] @ y[b, n] / z[b, n].norm() / y[b, n].norm() for b in range(2) for n in range(3)) / 6
    assert haste.feature_loss(z, y).item() == pytest.approx(naive.item(), rel=1e-5)
    # in fp16 its norm would overflow
    assert haste.feature_loss(1e4 * z.half(), z).item() == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize("student, teacher", [(6, 12), (12, 12), (16, 12), (16, 16), (4, 2)])
def test_attention_loss_is_the_mean_cross_entropy_of_the_paired_heads(student, teacher):
    torch.manual_seed(0)
    pairs = [[tuple(torch.randn(2, h, 5, d) for _ in "qk") for _ in range(2)]
             for h, d in ((student, 6), (teacher, 4))]
    paired, total = min(student, teacher, 12), 0.0
    for (q, k), (q_t, k_t) in zip(*pairs):
        for b in range(2):
            for h in range(paired):
                for i in range(5):
                    a_s = torch.softmax(
                        torch.stack([q[b, h, i] @ k[b, h, j] / math.sqrt(6) for j in range(5)]), 0)
                    a_t = torch.softmax(
                        torch.stack([q_t[b, h, i] @ k_t[b, h, j] / math.sqrt(4) for j in range(5)]), 0)
                    total -= sum(a_t[j] * math.log(a_s[j]) for j in range(5)).item()
    assert haste.attention_loss(*pairs).item() == pytest.approx(total / (2 * 2 * paired * 5), rel=1e-5)


def test_attention_loss_of_a_uniform_student_is_log_n_and_its_floor_is_the_teachers_entropy():
    zero, q, k = torch.zeros(1, 3, 256, 8), 2 * torch.randn(1, 3, 256, 8), torch.randn(1, 3, 256, 8)
    assert haste.attention_loss([(zero, zero)], [(q, k)]).item() == pytest.approx(math.log(256), rel=1e-6)
    a = (q @ k.mT / 8 ** 0.5).softmax(-1)
    assert haste.attention_loss([(q, k)], [(q, k)]).item() == pytest.approx(
        -(a * a.log()).sum(-1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_loss_survives_logit_gaps_past_100(dtype):
    q = torch.tensor([[300.0], [1.0]]).view(1, 1, 2, 1).to(dtype).requires_grad_()
    k = torch.tensor([[1.0], [0.0]]).view(1, 1, 2, 1).to(dtype)
    away = torch.tensor([[0.0], [300.0]]).view(1, 1, 2, 1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = haste.attention_loss([(q, k)], [(away.flip(2), k.flip(2))])
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and loss > 50 and q.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def naive_attention_loss(q, k, q_t, k_t):
    a = torch.softmax(q_t @ k_t.mT / q_t.shape[-1] ** 0.5, -1)
    return -(a * torch.log_softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)).sum(-1).mean()


@pytest.mark.parametrize("piece", [1, 14, 100, 2 ** 21])
def test_attention_loss_has_the_gradient_of_the_naive_formula_in_whatever_pieces(piece, monkeypatch):
    monkeypatch.setattr(haste, "MAP_PIECE", piece)
    torch.manual_seed(0)
    inputs = [torch.randn(6, 7, d, dtype=torch.float64, requires_grad=d == 5) for d in (5, 5, 4, 4)]
    assert torch.autograd.gradcheck(haste.CrossEntropyOfMaps.apply, inputs)
    mine, naive = haste.CrossEntropyOfMaps.apply(*inputs), naive_attention_loss(*inputs)
    assert mine.item() == pytest.approx(naive.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(3 * mine, inputs[:2]), torch.autograd.grad(3 * naive, inputs[:2])):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_attention_loss_in_halves_is_that_of_the_same_numbers_in_fp64(dtype, tolerance):
    torch.manual_seed(0)
    # gaps of some hundreds
    q, k = ((6 * torch.randn(2, 16, 33, 72)).to(dtype).requires_grad_() for _ in "qk")
    q_t, k_t = ((3 * torch.randn(2, 12, 33, 64)).to(dtype) for _ in "qk")
    wide = [x.detach().double()[:, :12].requires_grad_() for x in (q, k)]
    loss = haste.attention_loss([(q, k)], [(q_t, k_t)])
    exact = naive_attention_loss(*wide, q_t.double(), k_t.double())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for x, y in zip(torch.autograd.grad(loss, (q, k)), torch.autograd.grad(exact, wide)):
        assert (x[:, :12] - y).norm() < tolerance * y.norm()
        assert not x[:, 12:].any()      # the last four heads are free


@pytest.mark.parametrize("N", [1024, 4096])
def test_the_memory_of_attention_loss_grows_with_n_not_its_square(N):
    inputs = [torch.randn(1, 12, N, 8, requires_grad=i < 2) for i in range(4)]
    with Largest() as mine:
        haste.attention_loss([inputs[:2]], [inputs[2:]]).backward()
    assert mine.numel <= 2 ** 21 <= 12 * N ** 2 / 6 and (N < 4096 or mine.numel <= 12 * N ** 2 / 90)


def test_the_diffusion_loss_by_hand_and_a_term_of_weight_0_left_out():
    model = awake(tiny_sit())
    x0, eps, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([0.25, 0.75])
    y = torch.tensor([1, 2])
    x_t = torch.stack([0.75 * x0[0] + 0.25 * eps[0], 0.25 * x0[1] + 0.75 * eps[1]])
    diff, repa, atta = haste.losses(model, x0, eps, t, y)
    assert diff.item() == pytest.approx((model(x_t, t, y) - eps + x0).square().mean().item(), rel=1e-6)
    assert not repa and not atta
    target = haste.Teacher(tiny_vit(), (1, 2), 4)(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    both, no_r, no_a = (haste.losses(model, x0, eps, t, y, target, *w) for w in ((1, 1), (0, 1), (1, 0)))
    assert no_r[1] == 0 == no_a[2] and no_r[2] == both[2] != 0 and no_a[1] == both[1] != 0


# ---- 4. Termination ----------------------------------------------------------------------------------------

class OneWeight(nn.Module):
    """v = w everywhere, z = (w, 1): with y = (1, 0), alignment wants a larger w, L_diff w = eps - x0."""
    feature_block = 1

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False)])
        nn.init.ones_(self.blocks[0].weight)

    def forward(self, x, t, y, align=False):
        w = self.blocks[0].weight.view(())
        return w.expand_as(x), torch.stack([w, torch.ones(())]).expand(len(x), 1, 2), []


@pytest.mark.parametrize("wish, cosine", [(2.0, 1.0), (0.0, -1.0)])
def test_the_trigger_measures_the_angle_of_the_averaged_gradients(wish, cosine):
    target = torch.tensor([[[1.0, 0.0]]]).expand(3, 1, 2), []
    x0, labels = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    batches = [(0.5, x0, x0 + wish, labels, target), (0.5, x0, x0 + wish, labels, target)]
    assert haste.gradient_cosine(OneWeight(), 0.5, batches, 0.5, 0) == pytest.approx(cosine)
    # one image pulls hard against two that pull softly: the mean of cosines would be +1/3
    opposed = [(2 / 3, x0, x0 + 1.1, labels, target), (1 / 3, x0, x0 - 9, labels, target)]
    assert haste.gradient_cosine(OneWeight(), 0.5, opposed, 0.5, 0) == pytest.approx(-1)


def test_the_trigger_stops_alignment_once_for_all_and_a_resumed_run_does_not_ask_again(
        world, tmp_path, monkeypatch):
    asked, real = [], haste.gradient_cosine

    def angle(model, t, *rest):
        real(model, t, *rest)
        asked.append(t)
        return 0.3 if len(asked) <= 4 else -0.2

    monkeypatch.setattr(haste, "gradient_cosine", angle)
    auto = flags(world, tmp_path, tau="auto", tau_from=2, tau_every=2, tau_images=12, max_train_steps=7,
                 checkpointing_steps=1)
    haste.main(auto)
    assert asked == 2 * [0.02, 0.1, 0.5, 0.8]       # at steps 2 and 4, at the paper's times, and no more
    lines = metrics(tmp_path)
    assert [(m["step"], m["cosine"]) for m in lines if "cosine" in m] == [
        (2, pytest.approx(0.3)), (4, pytest.approx(-0.2))]
    assert {m["step"]: m["phase"] for m in lines if "phase" in m} == {
        1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2}
    assert checkpoint(tmp_path, 4)["tau"] is None and checkpoint(tmp_path, 5)["tau"] == 4
    whole = checkpoint(tmp_path, 7)
    for step in (6, 7):
        (tmp_path / "run" / "checkpoints" / f"{step:07d}.pt").unlink()
    haste.main(auto)
    assert len(asked) == 8 and same(whole, checkpoint(tmp_path, 7))


def test_no_line_of_metrics_mixes_the_phases_where_auto_stops(world, tmp_path):
    haste.main(flags(world, tmp_path, tau="auto", tau_from=3, tau_every=50, tau_images=12, tau_cosine=1,
                     log_every=4, max_train_steps=6))
    lines = [m for m in metrics(tmp_path) if "phase" in m]
    assert [(m["step"], m["phase"], m["loss_repa"] != 0) for m in lines] == [
        (3, 1, True), (4, 2, False), (6, 2, False)]


def test_auto_asks_in_a_run_that_began_with_a_number(world, tmp_path):
    haste.main(flags(world, tmp_path, tau=100, max_train_steps=2))
    haste.main(flags(world, tmp_path, tau="auto", tau_from=2, tau_every=2, tau_images=12, tau_cosine=1,
                     max_train_steps=4))
    assert [m["step"] for m in metrics(tmp_path) if "cosine" in m] == [2]
    assert checkpoint(tmp_path, 4)["tau"] == 2


def test_an_angle_is_logged_once_also_where_a_killed_run_measures_it_again(world, tmp_path):
    auto = flags(world, tmp_path, tau="auto", tau_from=2, tau_every=2, tau_images=12, tau_cosine=-1)
    haste.main(auto)
    for path in (tmp_path / "run" / "checkpoints").glob("000000[56].pt"):
        path.unlink()
    haste.main(auto)
    assert [m["step"] for m in metrics(tmp_path) if "cosine" in m] == [2, 4]
    assert [m["step"] for m in metrics(tmp_path) if "phase" in m] == [1, 2, 3, 4, 5, 6]


# ---- 5. The samplers ---------------------------------------------------------------------------------------

class GaussianVelocity(nn.Module):
    """The exact velocity of data from N(0, c^2): E[eps - x0 | x_t]."""
    null_label, c = 3, 0.5

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item(), y.tolist()))
        s = t.view(-1, 1, 1, 1).double()
        return ((s - (1 - s) * self.c ** 2) / ((1 - s) ** 2 * self.c ** 2 + s ** 2) * x).to(x.dtype)


def test_the_samplers_turn_noise_into_data():
    noise = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(4, dtype=torch.long)
    exact = 0.5 * noise.double()        # the flow of a Gaussian is a scaling
    ode, heun = (haste.sample(GaussianVelocity(), noise, labels, steps=100, mode=m) for m in ("ode", "heun"))
    assert (ode - exact).abs().max() < 0.05 and (heun - exact).abs().max() < 0.003
    assert ode.dtype == torch.float64
    torch.manual_seed(0)
    sde = haste.sample(GaussianVelocity(), noise, labels)
    assert sde.std().item() == pytest.approx(0.5, abs=0.02)
    assert torch.corrcoef(torch.stack([sde.flatten(), noise.flatten()]))[0, 1] < 0.5


def test_steps_count_evaluations_and_guidance_doubles_only_inside_its_interval():
    noise, labels = torch.randn(2, 1, 2, 2), torch.tensor([0, 2])
    for mode, evaluations in (("sde", 6), ("ode", 6), ("heun", 11)):
        model = GaussianVelocity()
        haste.sample(model, noise, labels, steps=6, cfg_scale=2.0, guidance=(0.3, 0.7), mode=mode)
        assert len(model.calls) == evaluations
        for n, t, y in model.calls[::2] if mode == "heun" else model.calls:
            assert (n, y) == ((4, [0, 2, 3, 3]) if 0.3 <= t <= 0.7 else (2, [0, 2]))
    model = GaussianVelocity()
    haste.sample(model, noise, labels)
    assert [t for _, t, _ in model.calls] == pytest.approx(np.linspace(1, 0.04, 250).tolist())


# ---- 6. Data -----------------------------------------------------------------------------------------------

def test_the_stream_is_one_permutation_after_another_whatever_the_number_of_processes():
    args = argparse.Namespace(batch_size=6, seed=3)
    whole = np.concatenate([i for i, _ in haste.requests(10, args, range(6), range(5), True)])
    assert [sorted(whole[e * 10:e * 10 + 10]) for e in range(3)] == [list(range(10))] * 3
    assert list(whole[:10]) != list(whole[10:20])
    halves = [[i for i, _ in haste.requests(10, args, range(r * 3, r * 3 + 3), range(5), True)]
              for r in range(2)]
    assert np.array_equal(whole, np.concatenate([np.concatenate(pair) for pair in zip(*halves)]))
    args.seed = 4
    reseeded, _ = next(haste.requests(10, args, range(6), range(5), True))
    assert list(reseeded) != list(whole[:6])


def test_chance_depends_on_seed_and_step_alone():
    one, again, *others = (haste.draw(4, (3, 2, 2), torch.device("cpu"), *key)
                           for key in ((0, 7), (0, 7), (0, 8), (1, 7)))
    assert same(one, again)
    assert not any(torch.equal(a, b) for other in others for a, b in zip(one, other))
    assert [x.shape for x in one] == [(4,), (4,), (4, 3, 2, 2), (4, 3, 2, 2)]
    assert not torch.equal(one[2], one[3])


def picture_tree(folder):
    """Images of every kind, with what each must become: a red left half, a blue right half."""
    halves = np.zeros((40, 60, 3), np.uint8)
    halves[:, :30, 0] = halves[:, 30:, 2] = 255
    rgb, a = Image.fromarray(halves), folder / "a"
    a.mkdir(parents=True)
    rgb.save(a / "png.png")
    rgb.convert("CMYK").save(a / "cmyk.jpg", quality=100)
    rgb.quantize(4).save(a / "palette.PNG")
    rgb.save(a / "animated.webp", save_all=True, append_images=[Image.new("RGB", (60, 40))], lossless=True)
    exif = Image.Exif()
    exif[274] = 6       # shown after a quarter turn clockwise
    rgb.rotate(90, expand=True).save(a / "turned.jpeg", exif=exif, quality=100)
    rgb.convert("RGBA").save(a / "alpha.png")
    Image.fromarray(np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)).save(a / "grey16.png")
    (folder / "b" / "deep").mkdir(parents=True)
    Image.fromarray(np.full((10, 10), 77, np.uint8)).save(folder / "b" / "deep" / "grey.png")
    (a / "cut.jpg").write_bytes((a / "cmyk.jpg").read_bytes()[:300])
    (folder / "b" / "text.png").write_text("no picture")
    (folder / "b" / "notes.txt").write_text("not looked at")


def test_prepare_reads_every_kind_of_image_upright_and_skips_by_name_what_it_cannot(tmp_path, capsys):
    picture_tree(tmp_path / "src")
    haste.main(preparing(tmp_path / "src", tmp_path / "out", "--resolution", 16, "--num-workers", 2))
    out = capsys.readouterr().out
    assert "8 images of 2 classes" in out and "2 could not be read" in out and "cut.jpg" in out
    assert "text.png" in out
    data, names = haste.Data(tmp_path / "out"), json.loads((tmp_path / "out" / "files.json").read_text())
    assert len(data) == 8 and data.classes == ["a", "b"] and data.shape == (3, 16, 16) and data.vae is None
    for i, name in zip(range(8), [names[s] for s in data.slots]):
        batch = data[np.array([i]), True]
        image = batch["images"][0].float()
        if "grey16" in name:
            assert image.std(0).max() == 0 and 60 < image.mean() < 195 and image[0, 0, 0] < image[0, -1, -1]
        elif "grey" in name:
            assert (image == 77).all() and batch["labels"].item() == 1
        else:
            assert image[0, :, :6].mean() > 220 and image[2, :, :6].mean() < 40, name
            assert image[2, :, 10:].mean() > 220 and image[0, :, 10:].mean() < 40, name
            assert batch["labels"].item() == 0, name


def test_the_crop_is_adms():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 96, 3), np.uint8)
    small = image.reshape(32, 2, 48, 2, 3).mean((1, 3)).round().reshape(16, 2, 24, 2, 3).mean((1, 3))
    got = np.asarray(haste.center_crop(Image.fromarray(image), 16)).astype(float)
    # two halvings with BOX, and the middle of the longer side
    assert np.abs(got - small[:, 4:20]).max() <= 2
    # 64 is 2 x 20 and more, 32 is less: one halving
    once = Image.fromarray(image).resize((48, 32), Image.Resampling.BOX).resize(
        (30, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(haste.center_crop(Image.fromarray(image), 20)),
                          np.asarray(once)[:, 5:25])


class StubVAE(nn.Module):
    """diffusers' AutoencoderKL as far as haste.py knows it: mean and std, (4, R / 8, R / 8)."""
    config = types.SimpleNamespace(scaling_factor=0.25)

    def encode(self, x):
        small = F.avg_pool2d(x, 8)
        mean = torch.cat([small, small[:, :1] * 0 + 0.5], 1)
        return types.SimpleNamespace(
            latent_dist=types.SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.1)))

    def decode(self, z):
        return types.SimpleNamespace(sample=F.interpolate(z[:, :3], scale_factor=8))

    @classmethod
    def from_pretrained(cls, name):
        if name == "missing":
            raise OSError("no such model")
        return cls()


@pytest.fixture
def diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=StubVAE))


@pytest.fixture
def latents(world, diffusers):
    """The world's images at 64 x 64, with latents of 4 x 8 x 8."""
    if not (world / "latents").is_dir():
        haste.main(["--prepare", f"{world}/images", "--data-dir", f"{world}/latents", "--resolution", "64",
                    "--vae", "stub", "--num-workers", "0"])
    return world / "latents"


def test_latents_are_the_vaes_mean_and_std_and_x0_is_drawn_from_them(latents):
    data = haste.Data(latents)
    batch = data[np.arange(3), True]
    assert data.shape == (4, 8, 8) and (data.vae, data.scale, data.resolution) == ("stub", 0.25, 64)
    mean = F.avg_pool2d(batch["images"] / 127.5 - 1, 8)
    assert torch.allclose(batch["moments"][:, :3], mean, atol=1e-5) and (batch["moments"][:, 4:] == 0.1).all()
    xi = torch.randn(3, 4, 8, 8)
    assert torch.allclose(data.x0(batch, xi)[:, :3], 0.25 * (mean + 0.1 * xi[:, :3]), atol=1e-5)
    back = haste.to_images(0.25 * batch["moments"][:, :4], StubVAE(), 0.25)
    assert (back.float() - 127.5 * (F.interpolate(mean, scale_factor=8) + 1)).abs().max() <= 1


def test_an_interrupted_prepare_goes_on_and_ends_as_if_never_stopped(world, tmp_path, monkeypatch):
    argv = preparing(world / "images", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "files.json.part").write_text('["a')       # a first attempt, killed at once
    real, read = haste.Crops.__getitem__, []

    def fails_after_35(self, i):
        if len(read) == 35:
            raise KeyboardInterrupt
        read.append(i)
        return real(self, i)
    monkeypatch.setattr(haste.Crops, "__getitem__", fails_after_35)
    with pytest.raises(SystemExit, match="130"):
        haste.main(argv)
    # a batch of 32 had been finished
    with pytest.raises(haste.BadInput, match="lacks 8 of its 40 images"):
        haste.Data(tmp_path / "out")
    read.clear()
    haste.main(argv)
    assert len(read) == 8
    for name in ("images.npy", "labels.npy", "dataset.json"):
        assert (tmp_path / "out" / name).read_bytes() == (world / "data" / name).read_bytes()


def repa_layout(folder, n=10):
    """What REPA's preprocessing writes."""
    rng, labels = np.random.default_rng(0), []
    for i in range(n):
        for kind in ("images", "vae-sd"):
            (folder / kind / "00000").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), i, np.uint8)).save(
            folder / "images" / "00000" / f"img{i:08d}.png")
        name = f"00000/img-mean-std-{i:08d}.npy"
        np.save(folder / "vae-sd" / name, rng.random((1, 8, 8, 8), np.float32) + i)
        labels.append([name, i % 3])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))


def test_a_dataset_of_repas_preprocessing_trains_as_it_is(world, tmp_path):
    repa_layout(tmp_path / "repa")
    data = haste.Data(tmp_path / "repa")
    batch = data[np.array([7, 2]), True]
    assert (len(data), data.shape, data.resolution, len(data.classes)) == (10, (4, 8, 8), 64, 3)
    assert (data.vae, data.scale) == ("stabilityai/sd-vae-ft-mse", 0.18215)
    assert batch["labels"].tolist() == [1, 2] and batch["images"][:, 0, 0, 0].tolist() == [7, 2]
    assert batch["moments"].mean((1, 2, 3)).tolist() == pytest.approx([7.5, 2.5], abs=0.1)
    haste.main(flags(world, tmp_path, data_dir=tmp_path / "repa"))
    assert [m["phase"] for m in metrics(tmp_path)] == [1, 1, 1, 2, 2, 2]


def test_a_damaged_file_of_a_dataset_is_named_whoever_reads_it(world, tmp_path, capsys):
    repa_layout(tmp_path / "repa")
    path = tmp_path / "repa" / "images" / "00000" / "img00000003.png"
    path.write_bytes(path.read_bytes()[:60])
    for workers in (0, 1):
        err = complaint(capsys, flags(world, tmp_path / "out", data_dir=tmp_path / "repa",
                                      num_workers=workers))
        assert err.startswith(f"haste.py: {path} cannot be read")
    run = launch(flags(world, tmp_path / "out", data_dir=tmp_path / "repa", num_workers=2))
    assert run.wait(60) == 2        # with loader processes it ends, too
    name = tmp_path / "repa" / "vae-sd" / "00000" / "img-mean-std-00000003.npy"
    name.write_bytes(name.read_bytes()[:-9])
    assert "00000003.npy has" in complaint(capsys, flags(world, tmp_path, data_dir=tmp_path / "repa"))


def test_what_was_prepared_and_cut_short_is_not_filled_up(world, tmp_path, capsys):
    again = preparing(world / "images", tmp_path / "data")
    shutil.copytree(world / "data", tmp_path / "data")
    path = tmp_path / "data" / "images.npy"
    path.write_bytes(path.read_bytes()[:-500])
    size = path.stat().st_size
    assert "images.npy is missing or cut short" in complaint(capsys, again) and path.stat().st_size == size


# ---- 7. Files ----------------------------------------------------------------------------------------------

def test_checkpoints_of_repa_and_bare_state_dicts_load_strictly(tmp_path, capsys):
    model = awake(haste.build_model("SiT-S/8", input_size=16, num_classes=3, teacher_dim=768))
    repas = {"ema": model.state_dict(), "model": {}, "opt": {}, "steps": 5,
             "args": argparse.Namespace(model="SiT-S/8", resolution=128, num_classes=3)}
    torch.save(repas, tmp_path / "repa.pt")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    x, t, y = torch.randn(1, 4, 16, 16), torch.tensor([0.5]), torch.tensor([3])
    for loaded, _ in (haste.load_model(tmp_path / "repa.pt", None),
                      haste.load_model(tmp_path / "bare.pt", "SiT-S/8")):
        assert torch.equal(loaded(x, t, y), model(x, t, y)) and loaded.null_label == 3 and not loaded.training
    pixels = haste.build_model("SiT-XS/4", input_size=8, in_channels=3, num_classes=4)
    torch.save(pixels.state_dict(), tmp_path / "pixels.pt")
    for more in ([], ["--vae", "none"]):        # three channels need no VAE
        haste.main(["--sample", f"{tmp_path}/pixels.pt", "--model", "SiT-XS/4", "--num-steps", "2", "--out",
                    f"{tmp_path}/a.png", *more])
    pixels = ["--sample", tmp_path / "pixels.pt", "--model", "SiT-XS/4", "--vae", "stub"]
    assert "learned pixels" in complaint(capsys, pixels)


@pytest.mark.parametrize("encoder, given, decoder", [
    ("stabilityai/sd-vae-ft-mse", None, "stabilityai/sd-vae-ft-ema"), ("another", None, "another"),
    ("another", "its/own", "its/own"), (None, None, None), (None, "none", None)])
def test_what_sd_vae_ft_mse_encoded_sd_vae_ft_ema_decodes(encoder, given, decoder):
    assert haste.decoder_of(encoder, given) == decoder


def test_training_goes_on_without_grids_where_the_vae_is_missing(
        world, latents, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    haste.main(flags(world, tmp_path, data_dir=latents, tau=0, sampling_steps=1, max_train_steps=1))
    assert "no grids of samples will be drawn" in capsys.readouterr().out
    assert checkpoint(tmp_path, 1)["steps"] == 1 and not (tmp_path / "run" / "samples").exists()


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)
    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(haste.BadInput):
        haste.load_file(tmp_path / "bomb.pt")
    with pytest.raises(Exception):
        torch.load(tmp_path / "bomb.pt", weights_only=False)        # as torch.hub's own code does it
    assert not (tmp_path / "exploded").exists()


# ---- 8. Training -------------------------------------------------------------------------------------------

def test_a_run_through_both_phases_leaves_checkpoints_metrics_and_a_grid(world, tmp_path):
    haste.main(flags(world, tmp_path, sampling_steps=6, ema_decay=1, lambda_r=0.25, lambda_a=2))
    lines = metrics(tmp_path)
    assert [(m["step"], m["phase"]) for m in lines] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    for m in lines:
        aligned = m["phase"] == 1
        assert (m["loss_repa"] != 0) == (m["loss_atta"] != 0) == aligned and m["images_per_sec"] > 0
        assert m["memory_gib"] > 0
        weighted = m["loss_diff"] + 0.25 * m["loss_repa"] + 2 * m["loss_atta"]
        assert m["loss"] == pytest.approx(weighted, rel=1e-4)
    saved = checkpoint(tmp_path, 6)
    assert {"model", "ema", "opt", "args", "steps"} <= saved.keys() and saved["steps"] == 6
    assert saved["args"]["model"] == "SiT-XS/2"
    assert sorted(p.stem for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "0000002", "0000003", "0000004", "0000006"]
    # an EMA that never follows says v = 0, and draws the noise itself
    ema, _ = haste.load_model(tmp_path / "run" / "checkpoints" / "0000006.pt", None)
    haste.write_grid(tmp_path / "noise.png", haste.to_images(haste.seeded_noise(ema, 32, 0, "cpu")), 8)
    grid = tmp_path / "run" / "samples" / "0000006.png"
    assert grid.read_bytes() == (tmp_path / "noise.png").read_bytes()
    projector = [k for k in saved["model"] if k.startswith("projectors")]
    at_tau = checkpoint(tmp_path, 3)["model"]
    assert all(torch.equal(saved["model"][k], at_tau[k]) for k in projector)
    assert not any(torch.equal(saved["model"][k], at_tau[k]) for k in saved["model"] if k.startswith("blocks")
                   and "qkv" in k)


def test_after_tau_no_teacher_runs_no_image_is_read_and_no_map_is_formed(
        world, latents, tmp_path, monkeypatch):
    calls, images, aligned = [], [], []
    real_teacher, real_data, real_sit = haste.Teacher.forward, haste.Data.__getitem__, haste.SiT.forward

    def teacher(self, x):
        calls.append(len(x))
        return real_teacher(self, x)

    def data(self, request):
        batch = real_data(self, request)
        images.append("images" in batch)
        return batch

    def sit(self, x, t, y, align=False):
        aligned.append(align)
        return real_sit(self, x, t, y, align)
    monkeypatch.setattr(haste.Teacher, "forward", teacher)
    monkeypatch.setattr(haste.Data, "__getitem__", data)
    monkeypatch.setattr(haste.SiT, "forward", sit)
    haste.main(flags(world, tmp_path, data_dir=latents))
    assert calls == [8] * 3 and images == [True] * 3 + [False] * 3 == aligned


@pytest.mark.parametrize("precision, able, teachers, students", [
    ("fp32", True, torch.bfloat16, torch.float32), ("fp32", False, torch.float32, torch.float32),
    ("bf16", False, torch.bfloat16, torch.bfloat16), ("fp16", True, torch.float16, torch.float16)])
def test_the_teacher_runs_in_half_precision_where_that_is_faster(
        world, tmp_path, monkeypatch, precision, able, teachers, students):
    seen, real = set(), haste.losses

    def losses(model, x0, eps, t, labels, target, *weights):
        seen.add((target[1][0][0].dtype, model.blocks[0].mlp.fc1(torch.ones(1, 128)).dtype))
        return real(model, x0, eps, t, labels, target, *weights)

    monkeypatch.setattr(haste, "multiplies_bf16", lambda device: able)
    monkeypatch.setattr(haste, "losses", losses)
    haste.main(flags(world, tmp_path, precision=precision, max_train_steps=1))
    assert seen == {(teachers, students)}


def test_tau_0_never_loads_a_teacher_and_lambda_a_0_is_repa(world, tmp_path):
    haste.main(flags(world, tmp_path, tau=0, teacher="nowhere"))
    assert {(m["phase"], m["loss_repa"], m["loss_atta"]) for m in metrics(tmp_path)} == {(2, 0, 0)}
    haste.main(flags(world, tmp_path, tau="never", lambda_a=0, exp_name="repa"))
    lines = metrics(tmp_path, "repa")
    assert {m["phase"] for m in lines} == {1} and {m["loss_atta"] for m in lines} == {0}
    assert all(m["loss_repa"] for m in lines)


def test_the_ema_starts_at_the_initial_weights_and_follows(world, tmp_path):
    haste.main(flags(world, tmp_path, max_train_steps=1, ema_decay=0.75, checkpointing_steps=1))
    torch.manual_seed(0)
    start = haste.build_model("SiT-XS/2", input_size=8, in_channels=3, num_classes=4, teacher_dim=24)
    start = start.state_dict()
    saved = checkpoint(tmp_path, 1)
    for k in start:
        assert torch.allclose(saved["ema"][k], 0.75 * start[k] + 0.25 * saved["model"][k], atol=1e-6), k


RESUMED = {"plain": {}, "accumulated": {"gradient_accumulation_steps": 2}, "bf16": {"precision": "bf16"},
           "fp16": {"precision": "fp16"}}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_stopped_in_phase_one_at_tau_and_after_it_ends_bit_for_bit_as_one_never_stopped(
        world, tmp_path, kind):
    more = RESUMED[kind] | {"checkpointing_steps": 1}
    haste.main(flags(world, tmp_path, exp_name="whole", **more))
    for stop in (2, 3, 4, 6):
        haste.main(flags(world, tmp_path, **more | {"max_train_steps": stop}))
    whole, resumed = checkpoint(tmp_path, 6, "whole"), checkpoint(tmp_path, 6)
    assert all(same(whole[k], resumed[k]) for k in ("model", "ema", "opt", "scaler", "steps", "tau"))
    assert [m["loss"] for m in metrics(tmp_path, "whole")] == [m["loss"] for m in metrics(tmp_path)]


def test_a_resumed_run_takes_this_commands_learning_rate_and_an_optimizer_that_was_not_fused(
        world, tmp_path, capsys):
    """As REPA's checkpoints have it; at rate 0 nothing moves."""
    haste.main(flags(world, tmp_path, max_train_steps=2))
    path = tmp_path / "run" / "checkpoints" / "0000002.pt"
    saved = torch.load(path)
    saved["opt"]["param_groups"][0] |= {"fused": None, "foreach": None}
    haste.write_checkpoint(path, saved)
    haste.main(flags(world, tmp_path, max_train_steps=3, learning_rate=0))
    assert same(checkpoint(tmp_path, 3)["model"], saved["model"])
    assert re.search("not as when .*learning_rate", capsys.readouterr().out)
    haste.main(flags(world, tmp_path, max_train_steps=4))
    assert not same(checkpoint(tmp_path, 4)["model"], saved["model"])


def test_training_drops_labels_at_the_rate_of_cfg_prob(world, tmp_path):
    haste.main(flags(world, tmp_path, tau=0, cfg_prob=1))
    early, late = (checkpoint(tmp_path, step)["model"]["y_embedder.embedding_table.weight"]
                   for step in (2, 6))
    assert torch.equal(early[:4], late[:4]) and not torch.equal(early[4], late[4])      # the null label alone


def launch(argv, processes=0, **popen):
    """haste.py as a user starts it, with torchrun where processes are asked for."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = [sys.executable, *(torchrun if processes else [])]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*run, HASTE, *map(str, argv)], env=env, text=True, **pipes | popen)


def test_killed_and_started_again_with_the_same_command_it_ends_the_same(world, tmp_path):
    argv = lambda name: flags(world, tmp_path, exp_name=name, max_train_steps=40, tau=20,
                              checkpointing_steps=5)
    killed = launch(argv("run"))
    while len(list((tmp_path / "run" / "checkpoints").glob("0*.pt"))) < 2:
        assert killed.poll() is None, killed.stderr.read()
    killed.kill()
    killed.wait()
    runs = [launch(argv(name)) for name in ("run", "whole")]
    assert [r.wait() for r in runs] == [0, 0] and "resuming" in runs[0].stdout.read()
    whole, resumed = checkpoint(tmp_path, 40, "whole"), checkpoint(tmp_path, 40)
    assert same(whole["model"], resumed["model"]) and same(whole["ema"], resumed["ema"])
    assert same(whole["opt"], resumed["opt"])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's death")
def test_torchrun_killed_outright_takes_its_processes_along(world, tmp_path):
    job = launch(flags(world, tmp_path, max_train_steps=10 ** 6, tau=0), 2)
    wait_for(tmp_path / "run" / "metrics.jsonl", job)
    job.kill()
    job.communicate(timeout=20)         # its processes hold the other end of the pipe
    with haste.exclusive(tmp_path / "run"):      # and no longer the lock
        pass


def test_a_killed_run_lets_go_of_its_folder_though_its_loaders_live_on(world, tmp_path):
    run = launch(flags(world, tmp_path, max_train_steps=10 ** 6, tau=0, num_workers=2))
    wait_for(tmp_path / "run" / "metrics.jsonl", run)
    run.kill()
    run.wait()
    with haste.exclusive(tmp_path / "run"):
        pass


def test_two_processes_do_what_one_does_with_the_same_global_batch(world, tmp_path):
    more = dict(tau="auto", tau_from=1, tau_every=2, tau_images=13, tau_cosine=-1, max_train_steps=4)
    late = dict(max_train_steps=8, tau=4)
    haste.main(flags(world, tmp_path, exp_name="one", **more))
    haste.main(flags(world, tmp_path, exp_name="one", **late))
    for phase in (more, late):
        two = launch(flags(world, tmp_path, exp_name="two", gradient_accumulation_steps=2, **phase),
                     processes=2)
        assert two.wait() == 0, two.stderr.read()
    one, two = metrics(tmp_path, "one"), metrics(tmp_path, "two")
    assert len(one) == len(two) == 10
    for a, b in zip(one, two):
        keys = [k for k in a if k.startswith(("loss", "grad_norm", "cosine", "step", "phase"))]
        assert [b[k] for k in keys] == pytest.approx([a[k] for k in keys], rel=1e-3, abs=1e-4)
    early, a, b = (checkpoint(tmp_path, *at)["model"] for at in ((2, "one"), (8, "one"), (8, "two")))
    apart, moved = (sum((x[k] - a[k]).square().sum().item() for k in a) for x in (b, early))
    assert apart < 0.01 * moved


def test_two_processes_share_the_work_of_prepare(world, tmp_path):
    shutil.copytree(world / "images", tmp_path / "src")
    (tmp_path / "src" / "class3" / "last.png").write_text("no picture")
    out, _ = finish(launch(preparing(tmp_path / "src", tmp_path / "out"), 2), 0)
    assert out.count("skipped 'class3/last.png'") == 1      # each image is the work of one
    for name in ("images.npy", "labels.npy"):
        assert np.array_equal(np.load(tmp_path / "out" / name)[:40], np.load(world / "data" / name))


def test_gradient_checkpointing_computes_each_block_anew_and_changes_nothing(world, tmp_path, monkeypatch):
    calls, real = [], haste.Block.forward
    monkeypatch.setattr(haste.Block, "forward", lambda self, *a: calls.append(self) or real(self, *a))
    haste.main(flags(world, tmp_path, exp_name="kept"))
    once = len(calls)
    haste.main(flags(world, tmp_path, exp_name="anew", grad_checkpoint=True))
    assert len(calls) == 3 * once       # as many again, and as many on the way back
    assert same(checkpoint(tmp_path, 6, "kept")["model"], checkpoint(tmp_path, 6, "anew")["model"])


def test_compiled_it_traces_each_phase_once_whatever_t_labels_and_step(world, tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounter
    traced = CompileCounter()
    monkeypatch.setattr(haste.SiT, "compile",
                        lambda self, **kw: nn.Module.compile(self, backend=traced, fullgraph=True, **kw))
    haste.main(flags(world, tmp_path, compile=True))
    assert traced.frame_count == 2 and len(metrics(tmp_path)) == 6


def test_the_bench_says_what_each_phase_costs(world, tmp_path, capsys):
    haste.main(["--bench", "--model", "SiT-XS/2", "--resolution", "64", "--batch-size", "2", "--teacher",
                f"{world}/teacher.pt", "--device", "cpu", "--json", f"{tmp_path}/bench.json"])
    report, printed = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    rows = report["rows"]
    assert list(rows) == ["plain SiT", "phase I", "phase II", "sampling", "sampling, guided"]
    assert all(name in printed for name in rows)
    # by hand: 2 for each weight and token, thrice for a training step; attention is two products of N x N x D
    D, N = 128, 16
    tokens, image = N * (12 * D * D + 2 * N * D), 6 * D * D
    block, ends = tokens + image, 256 * D + D * D + 2 * D * D + N * (16 * D + 16 * D)
    assert rows["sampling"]["tflop"] == pytest.approx(2 * 2 * (6 * block + ends) / 1e12, rel=0.01)
    assert rows["sampling, guided"]["tflop"] == pytest.approx(2 * rows["sampling"]["tflop"])
    assert rows["plain SiT"]["tflop"] == rows["phase II"]["tflop"] == pytest.approx(
        3 * rows["sampling"]["tflop"], rel=0.05)
    assert rows["phase I"]["tflop"] > rows["phase II"]["tflop"]
    assert all(r["ms_low"] <= r["ms"] <= r["ms_high"] for r in rows.values())
    assert report["phase2_over_plain"] == rows["phase II"]["over_plain"]
    assert 0 < report["phase1_over_expected"]


# --- Faults: nothing is lost, and the same command goes on

def finish(process, code):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, (process.returncode, out, err)
    assert "Traceback" not in err, err
    return out, err


def wait_for(path, process, count=1):
    while len(list(path.parent.glob(path.name))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("name, processes", [("SIGTERM", 0), ("SIGUSR1", 0), ("SIGINT", 0), ("SIGTERM", 2)])
def test_a_signal_makes_one_checkpoint_at_the_next_step_and_an_exit_code_that_says_again(
        world, tmp_path, name, processes):
    argv = flags(world, tmp_path, max_train_steps=100_000, tau=20, checkpointing_steps=100_000)
    run = launch(argv, processes)
    wait_for(tmp_path / "run" / "checkpoints" / "0000020.pt", run)     # which is at tau
    run.send_signal(getattr(signal, name))
    out, err = run.communicate(timeout=120)
    assert run.returncode == haste.AGAIN or processes, err
    step = max(int(p.stem) for p in (tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert 20 < step < 100_000 and checkpoint(tmp_path, step)["steps"] == step and f"after step {step}" in out
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.pt"))) == 2       # tau's, and this one
    assert metrics(tmp_path)[-1]["step"] == step
    haste.main(flags(world, tmp_path, max_train_steps=step + 1, tau=20))
    assert checkpoint(tmp_path, step + 1)["steps"] == step + 1


def test_a_second_ctrl_c_acts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with haste.stop_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_torn_or_altered_checkpoint_is_named_and_the_one_before_it_used(world, tmp_path, capsys):
    haste.main(flags(world, tmp_path, max_train_steps=4))
    newest, rng = tmp_path / "run" / "checkpoints" / "0000004.pt", np.random.default_rng(0)
    good = newest.read_bytes()
    assert haste.is_whole(newest)
    for cut in rng.integers(0, len(good), 20):
        newest.write_bytes(good[:cut])
        assert not haste.is_whole(newest), cut
    for place in rng.integers(0, len(good), 20):
        newest.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1:])
        assert not haste.is_whole(newest), place
    haste.main(flags(world, tmp_path))
    out = capsys.readouterr().out
    assert f"{newest} is torn" in out and "resuming " + str(newest).replace("0004", "0003") in out
    assert haste.is_whole(newest)
    for path in newest.parent.iterdir():
        path.write_bytes(b"")
    assert "no whole checkpoint" in complaint(capsys, flags(world, tmp_path))


def test_keep_leaves_the_newest_tau_and_the_papers_milestones(world, tmp_path, monkeypatch):
    monkeypatch.setattr(haste, "MILESTONES", {2})
    haste.main(flags(world, tmp_path, checkpointing_steps=1, keep=1, tau=4))
    assert sorted(p.stem for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "0000002", "0000004", "0000006"]


def test_keep_never_leaves_a_damaged_checkpoint_alone_nor_touches_other_files(world, tmp_path):
    haste.main(flags(world, tmp_path, max_train_steps=1, tau=0))
    folder = tmp_path / "run" / "checkpoints"
    for name in ("0000009", "0000001_mine"):
        (folder / f"{name}.pt").write_bytes(b"torn")
    haste.main(flags(world, tmp_path, checkpointing_steps=1, keep=1, max_train_steps=3, tau=0))
    assert sorted(p.stem for p in folder.iterdir()) == ["0000001_mine", "0000003", "0000009"]
    assert haste.is_whole(folder / "0000003.pt")


def poisoned(world, folder, slots):
    """The world's latents, those in some slots not finite."""
    shutil.copytree(world / "latents", folder)
    np.load(folder / "moments.npy", mmap_mode="r+")[slots] = np.nan
    return folder


@pytest.mark.parametrize("processes", [0, 2])
def test_a_step_that_is_not_finite_is_skipped_by_all_alike_and_logged_with_its_images(
        world, latents, tmp_path, processes):
    data = poisoned(world, tmp_path / "data", [7])
    run = launch(flags(world, tmp_path, data_dir=data, max_train_steps=10, log_every=5), processes)
    finish(run, 0)
    lines, saved = metrics(tmp_path), checkpoint(tmp_path, 10)
    skipped = [m for m in lines if m.get("skipped")]
    args = argparse.Namespace(batch_size=8, seed=0)
    order = np.concatenate([i for i, _ in haste.requests(40, args, slice(0, 8), range(10), False)])
    steps = [s + 1 for s in range(10) if 7 in order[8 * s:8 * s + 8]]
    assert [m["step"] for m in skipped] == steps and len(steps) == 2
    assert all(7 in m["indices"] and len(m["indices"]) == 8 for m in skipped)
    assert all(x.isfinite().all() for part in ("model", "ema") for x in saved[part].values())
    assert sum(m["skipped_steps"] for m in lines if "phase" in m) == 2
    assert all(math.isfinite(m["loss"]) for m in lines if "phase" in m)
    assert saved["opt"]["state"][1]["step"] == 8


def test_a_skipped_step_is_no_curve_in_tensorboard(world, latents, tmp_path, monkeypatch):
    written = []
    board = types.SimpleNamespace(SummaryWriter=lambda *a, **kw: types.SimpleNamespace(
        add_scalar=lambda name, value, step: written.append((name, float(value), step))))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    haste.main(flags(world, tmp_path, data_dir=poisoned(world, tmp_path / "data", [7]), tensorboard=True))
    assert ("loss" in {name for name, *_ in written}) and "indices" not in {name for name, *_ in written}
    assert any("indices" in m for m in metrics(tmp_path))


def test_gradients_are_clipped_to_the_norm_asked_for_and_0_clips_nothing(world, tmp_path):
    for name, norm in (("none", 0), ("huge", 1e9), ("clipped", 0.01)):
        haste.main(flags(world, tmp_path, exp_name=name, max_grad_norm=norm, max_train_steps=1))
    assert same(checkpoint(tmp_path, 1, "none")["model"], checkpoint(tmp_path, 1, "huge")["model"])
    state = checkpoint(tmp_path, 1, "clipped")["opt"]["state"].values()
    first = torch.cat([x["exp_avg"].flatten() for x in state])      # a tenth of the gradient
    assert first.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_loss_alone_that_is_not_finite_skips_the_step(world, tmp_path, monkeypatch):
    real = haste.losses
    monkeypatch.setattr(haste, "losses", lambda *a: (real(*a)[0] + math.inf, *real(*a)[1:]))
    haste.main(flags(world, tmp_path, max_train_steps=2, checkpointing_steps=1))
    assert same(checkpoint(tmp_path, 1)["model"], checkpoint(tmp_path, 2)["model"])
    assert sum("skipped" in m for m in metrics(tmp_path)) == 2


def test_too_many_skipped_steps_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(
        world, latents, tmp_path, capsys, monkeypatch):
    haste.main(flags(world, tmp_path, data_dir=latents, max_train_steps=2, tau=0))
    before = (tmp_path / "run" / "checkpoints" / "0000002.pt").read_bytes()
    monkeypatch.setattr(haste, "MAX_SKIPPED", 6)
    data = poisoned(world, tmp_path / "data", slice(None))
    given = flags(world, tmp_path, data_dir=data, max_train_steps=100, tau=0, checkpointing_steps=50)
    err = complaint(capsys, given, code=1)
    assert "not finite" in err and "6 steps" in err and "--precision" in err
    assert (tmp_path / "run" / "checkpoints" / "0000002.pt").read_bytes() == before
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_two_runs_in_one_folder_the_second_is_told_the_firsts_process(world, tmp_path, capsys):
    first = launch(flags(world, tmp_path, max_train_steps=100_000))
    wait_for(tmp_path / "run" / "metrics.jsonl", first)
    assert f"process {first.pid}" in complaint(capsys, flags(world, tmp_path))
    haste.main(flags(world, tmp_path, max_train_steps=1, exp_name="other"))     # while the first still runs
    first.kill()
    first.wait()


@pytest.mark.parametrize("limit, what", [
    (200_000, "checkpoint"), (300, "metrics.jsonl"), (1500, "--prepare")])
def test_a_full_disk_gets_a_sentence_and_leaves_no_torn_file(world, tmp_path, limit, what):
    """Here a limit on the size of a file, as far as a program can tell the same."""
    full = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    if what == "--prepare":
        _, err = finish(launch(["--prepare", world / "images", "--data-dir", tmp_path / "out",
                                "--resolution", 64, "--vae", "none"], **full), 1)
        assert not (tmp_path / "out" / "dataset.json").exists()
    else:
        _, err = finish(launch(flags(world, tmp_path), **full), 1)
        assert all(m["step"] for m in metrics(tmp_path))        # its lines are whole
        assert not list((tmp_path / "run").rglob("*.part")) and not list((tmp_path / "run").rglob("*.pt"))
    assert "File too large" in err and err.strip().splitlines()[-1].startswith("haste.py: ")


def test_a_process_that_hangs_ends_the_job_within_the_set_time(world, tmp_path):
    run = launch(flags(world, tmp_path, max_train_steps=100_000, timeout=5), processes=2)
    wait_for(tmp_path / "run" / "metrics.jsonl", run)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGSTOP)
    began = time.time()
    ask = ["pgrep", "-P", str(run.pid)]
    while children[0] in subprocess.run(ask, capture_output=True, text=True).stdout.split():
        assert time.time() - began < 60
        time.sleep(0.2)
    os.kill(int(children[-1]), signal.SIGKILL)      # torchrun would do it after half a minute
    _, err = run.communicate(timeout=90)
    assert run.returncode and "another process of this job died or hangs" in err


DAMAGES = {
    "images.npy is missing or cut short": lambda d: (d / "images.npy").write_bytes(
        (d / "images.npy").read_bytes()[:-1]),
    "labels.npy is missing or cut short": lambda d: (d / "labels.npy").write_bytes(b""),
    "images.npy is uint8 (39, 3, 8, 8)": lambda d: np.save(d / "images.npy", np.load(d / "images.npy")[1:]),
    "images.npy is float64": lambda d: np.save(d / "images.npy", np.load(d / "images.npy").astype(float)),
    "labels from 0 to 9": lambda d: np.save(d / "labels.npy", np.r_[np.load(d / "labels.npy")[1:], 9]),
    "labels from -7 to 3": lambda d: np.save(d / "labels.npy", np.r_[np.load(d / "labels.npy")[1:], -7]),
    "dataset.json cannot be read": lambda d: (d / "dataset.json").write_text("{"),
    "dataset.json lacks 'vae'": lambda d: (d / "dataset.json").write_text(
        '{"resolution": 8, "classes": ["a"]}'),
    "Python objects": lambda d: np.save(d / "labels.npy", np.array([{}]), allow_pickle=True),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_damaged_data_is_told_at_the_start(world, tmp_path, capsys, sentence):
    shutil.copytree(world / "data", tmp_path / "data")
    DAMAGES[sentence](tmp_path / "data")
    assert sentence in complaint(capsys, flags(world, tmp_path / "out", data_dir=tmp_path / "data"))
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_is_told_that_its_data_changed(world, latents, tmp_path, capsys):
    haste.main(flags(world, tmp_path, data_dir=latents, max_train_steps=1))
    shutil.copytree(latents, tmp_path / "data")
    facts = json.loads((latents / "dataset.json").read_text())
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(facts | {"vae": "another"}))
    assert "vae stub" in complaint(capsys, flags(world, tmp_path, data_dir=tmp_path / "data"))


def test_prepare_finishes_over_a_hostile_tree_and_lists_what_it_left_out(tmp_path, capsys):
    a = tmp_path / "src" / "a"
    a.mkdir(parents=True)
    Image.new("RGB", (20, 20), "red").save(a / "good.png")
    (a / "empty.png").write_bytes(b"")
    (a / "text.jpg").write_text("no picture")
    (a / "cut.png").write_bytes((a / "good.png").read_bytes()[:40])
    Image.new("1", (30_000, 30_000)).save(a / "bomb.png")
    Image.new("RGB", (20, 20), "blue").save(a / "new\nline.png")
    with open(os.fsencode(a) + b"/\xff\xfe.png", "wb") as f:
        Image.new("RGB", (20, 20), "blue").save(f, "PNG")
    (a / "loop").symlink_to(tmp_path / "src")
    (a / "nowhere.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(a / "pipe.png")
    (a / "folder.png").mkdir()
    haste.main(preparing(tmp_path / "src", tmp_path / "out", "--num-workers", 1))
    out = capsys.readouterr().out
    assert "3 images of 1 classes" in out and "6 could not be read" in out
    bad = "empty.png", "text.jpg", "cut.png", "bomb.png", "nowhere.png", "pipe.png"
    assert all(name in out for name in bad)
    assert len(haste.Data(tmp_path / "out")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills", [(0, 20), (2, 10)])
def test_killed_at_any_instant_it_ends_the_same(world, tmp_path, processes, kills):
    rng = np.random.default_rng(processes)
    kinds = [dict(), dict(tau="auto", tau_from=4, tau_every=4, tau_images=8, tau_cosine=0.9),
             dict(gradient_accumulation_steps=2), dict(precision="fp16")]
    for kind, more in enumerate(kinds):
        given = dict(max_train_steps=30, tau=12, checkpointing_steps=3) | more
        began = time.time()
        finish(launch(flags(world, tmp_path, exp_name=f"whole{kind}", **given), processes), 0)
        length = time.time() - began
        for k in range(kind, kills, len(kinds)):
            run = launch(flags(world, tmp_path, exp_name=f"killed{k}", **given), processes,
                         start_new_session=True)
            time.sleep(rng.uniform(0.3, 1.0) * length)
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
            finish(launch(flags(world, tmp_path, exp_name=f"killed{k}", **given), processes), 0)
            whole, killed = checkpoint(tmp_path, 30, f"whole{kind}"), checkpoint(tmp_path, 30, f"killed{k}")
            parts = "model", "ema", "opt", "scaler", "steps", "tau"
            assert all(same(whole[part], killed[part]) for part in parts), (kind, k)


@pytest.mark.slow
def test_memory_files_and_threads_are_flat_over_3000_steps(world, tmp_path):
    nowhere = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)    # an unread pipe fills up
    run = launch(flags(world, tmp_path, max_train_steps=3000, tau=1500, checkpointing_steps=500,
                       log_every=100, num_workers=1), **nowhere)
    seen = []
    while run.poll() is None:
        lines = metrics(tmp_path) if (tmp_path / "run" / "metrics.jsonl").is_file() else []
        try:
            status = Path(f"/proc/{run.pid}/status").read_text()
            facts = [int(status.split(key)[1].split()[0]) for key in ("VmRSS:", "Threads:")]
            seen.append((lines[-1]["step"] if lines else 0, *facts, len(os.listdir(f"/proc/{run.pid}/fd"))))
        except (OSError, IndexError):
            break
        time.sleep(0.5)
    assert run.wait() == 0
    early = max(rss for step, rss, _, _ in seen if 100 < step <= 500)
    late = max(rss for step, rss, _, _ in seen if 500 < step < 3000)        # not while it exits
    assert late < 1.02 * early
    for phase in (range(100, 1400), range(1700, 2900)):
        assert len({threads for step, _, threads, _ in seen if step in phase}) <= 2
        assert len({files for step, _, _, files in seen if step in phase}) <= 3


@pytest.mark.slow
def test_500_bad_inputs_get_a_sentence_and_leave_nothing(world, tmp_path, capsys):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st
    words = st.one_of(st.text(max_size=8), st.integers(-3, 10).map(str), st.floats().map(str),
                      st.sampled_from(["", "nan", "-1", "1e9", "auto", "/", "."]))
    names = [a for a in haste.parse([]).__dict__
             if a not in ("demo", "bench", "compile", "tensorboard", "wandb", "timeout", "num_workers")]

    @hypothesis.settings(max_examples=400, deadline=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.sampled_from(names), words)
    def flags_of_any_kind(name, word):
        out = tmp_path / "out"
        argv = flags(world, out, max_train_steps=1, tau=0) + [
            f"--{name.replace('_', '-')}={word}".replace("\0", "")]
        try:
            haste.main(argv)
        except SystemExit as stop:
            assert stop.code in (1, 2)
            assert "\n" not in capsys.readouterr().err.strip().split("haste.py: ")[-1]
            assert not list(out.rglob("*.part"))
        shutil.rmtree(out, ignore_errors=True)

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.sampled_from(["images.npy", "labels.npy", "dataset.json"]), st.integers(0, 10 ** 6),
                      st.binary(max_size=9))
    def datasets_of_any_kind(name, place, data):
        folder = tmp_path / "data"
        shutil.copytree(world / "data", folder, dirs_exist_ok=True)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:place % len(whole)] + data)
        try:
            haste.main(flags(world, tmp_path / "out", data_dir=folder, max_train_steps=1, tau=0))
        except SystemExit as stop:
            assert stop.code == 2
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    flags_of_any_kind()
    datasets_of_any_kind()


# ---- 9. Pictures -------------------------------------------------------------------------------------------

def test_sample_draws_the_labels_asked_for_from_the_ema(world, latents, tmp_path):
    haste.main(flags(world, tmp_path, data_dir=latents, max_train_steps=2))
    path = tmp_path / "run" / "checkpoints" / "0000002.pt"
    draw = ["--sample", path, "--labels", 0, 3, 1, "--num-steps", 4, "--vae", "stub", "--out"]
    haste.main([*map(str, draw), f"{tmp_path}/a.png"])
    haste.main([*map(str, draw), f"{tmp_path}/b.png"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").size == (3 * 65 + 1, 66)
    model, args = haste.load_model(path, None)
    assert same(model.state_dict(), checkpoint(tmp_path, 2)["ema"])
    assert (args["vae"], args["scale"]) == ("stub", 0.25)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A checkpoint of a network that never learned, but says something, of each label something else."""
    torch.manual_seed(0)
    model = awake(haste.build_model("SiT-XS/4", input_size=8, in_channels=3, num_classes=4))
    model.y_embedder.embedding_table.weight.data.mul_(50)
    path = tmp_path_factory.mktemp("talker") / "model.pt"
    torch.save({"ema": model.state_dict(), "args": {"model": "SiT-XS/4", "num_classes": 4}}, path)
    return path


DRAWN = ["", "--seed 1", "--num-steps 5", "--mode ode", "--mode heun", "--cfg-scale 2",
         "--cfg-scale 2 --guidance-high .5", "--cfg-scale 2 --guidance-low .5"]


def test_each_flag_of_drawing_is_heeded_by_sample_and_by_evaluate(talker, tmp_path):
    def drawn(more):
        haste.main(["--sample", f"{talker}", "--labels", "0", "1", "--num-steps", "4",
                    "--out", f"{tmp_path}/a.png", *more.split()])
        return (tmp_path / "a.png").read_bytes()

    def measured(more):
        args = evaluate.parse(["--ckpt", f"{talker}", "--ref", "none", "--num-samples", "8",
                               "--num-steps", "4", "--precision", "fp32", *more.split()])
        return evaluate.Generated(args, torch.device("cpu"))[range(4)].numpy().tobytes()

    for draw in (drawn, measured):
        assert draw("") == draw("") and len({draw(more) for more in DRAWN}) == len(DRAWN)
    a, b = (drawn(f"--labels 0 {y}") and haste.read_image(tmp_path / "a.png") for y in (1, 2))
    assert np.array_equal(a[..., :10], b[..., :10]) and not np.array_equal(a, b)        # a label, a picture


# ---- 10. The other backbones -------------------------------------------------------------------------------

def tiny_dit(**sizes):
    torch.manual_seed(0)
    return haste.DiT(**TINY | sizes)


def tiny_mmdit(**sizes):
    torch.manual_seed(0)
    return haste.MMDiT(**{"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 10,
                          "num_heads": 4, "context_dim": 12, "teacher_dim": 24, "projector_dim": 16} | sizes)


def test_dits_released_code_gives_these_figures_for_the_same_weights():
    """Loss, gradients and 12 respaced guided steps of facebookresearch/DiT, run on numpy's frozen streams."""
    model = with_frozen_weights(tiny_dit(input_size=16, in_channels=4, hidden_size=96, num_classes=10),
                                no="projectors")
    x0, eps, t = 0.5 * frozen(1, 3, 4, 16, 16), frozen(2, 3, 4, 16, 16), torch.tensor([0, 0.0375, 0.8])
    y = torch.tensor([3, 7, 1])
    each = [haste.losses(model, x0[i:i + 1], eps[i:i + 1], t[i:i + 1], y[i:i + 1])[0].item()
            for i in range(3)]
    assert each == pytest.approx([4.971220, 2.421021, 2.295545], rel=1e-5)
    haste.losses(model, x0, eps, t, y)[0].backward()
    grads = {"x_embedder.proj.weight": 0.33424, "blocks.1.attn.qkv.weight": 0.605419,
             "final_layer.linear.weight": 2.372707}
    assert {n: dict(model.named_parameters())[n].grad.norm().item() for n in grads} == pytest.approx(
        grads, rel=1e-4)
    drawn = iter(range(501, 600))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda a: frozen(next(drawn), *a.shape).to(a.dtype))
        out = haste.sample(model, frozen(9, 3, 4, 16, 16), y, steps=12, cfg_scale=1.8, mode="ddpm")
    wanted = [-120.932564, -170.767593, -589.873779, -355.143188]      # it never learned, and explodes
    assert out[1, :, 11, 3].tolist() == pytest.approx(wanted, rel=1e-4)
    assert out.abs().mean().item() == pytest.approx(226.444138, rel=1e-4)


def test_dit_is_sits_network_with_twice_the_channels_and_another_clock():
    with torch.device("meta"):
        model = haste.build_model("DiT-XL/2")
    own = [p for n, p in model.named_parameters() if not n.startswith("projectors")]
    assert sum(p.numel() for p in own) == 675_129_632
    dit, sit = awake(tiny_dit()), tiny_sit()
    assert dit.state_dict().keys() == sit.state_dict().keys()
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 998.0]), torch.tensor([0, 4])
    out, z, qk = dit(x, t, y, align=True)
    assert out.shape == (2, 6, 8, 8) and z.shape == (2, 16, 24) and qk[1][0].shape == (2, 4, 16, 8)
    # a SiT with the same weights, but half of the last layer's
    sit.load_state_dict({n: v[:len(sit.state_dict()[n])] for n, v in dit.state_dict().items()})
    assert torch.equal(sit(x, t, y, align=True)[1], z)


def test_time_becomes_one_of_dits_1000_timesteps():
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    times = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    timesteps = haste.DDPM.noised(x, x, times)[1]
    assert set(timesteps.tolist()) == set(range(1000))
    assert timesteps.mean().item() == pytest.approx(499.5, abs=3)
    assert haste.DDPM.noised(x, x, torch.tensor([0, 1 - 2 ** -24, 1.0]))[1].tolist() == [0, 999, 999]
    at = haste.DDPM.noised(x, x, torch.tensor(haste.TRIGGER_TIMES))[1]     # where to floor is to round
    assert at.tolist() == [round(1000 * t) for t in haste.TRIGGER_TIMES]


class Says(nn.Module):
    """A DiT that says what it is told."""
    diffusion, guided, null_label = haste.DDPM, 3, 9

    def __init__(self, out):
        super().__init__()
        self.out = nn.Parameter(out)

    def forward(self, x, t, y):
        self.x_t, self.t = x, t
        return self.out


@pytest.mark.parametrize("timestep", [0, 1, 2, 500, 999])
def test_dits_loss_is_the_squared_error_and_the_bound_in_bits(timestep):
    """Against scalars, one dimension after another, and torch.distributions."""
    x0 = torch.tensor([-1.0, -0.2, 0.3, 1.0], dtype=torch.float64).view(1, 1, 2, 2)
    eps = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    out = 0.3 * torch.randn(1, 2, 2, 2, dtype=torch.float64)
    abar = abar_s = 1.0
    for i in range(timestep + 1):
        beta = 1e-4 + (0.02 - 1e-4) * i / 999
        abar, abar_s = abar * (1 - beta), abar
    first = (1e-4, (1e-4 + (0.02 - 1e-4) / 999))
    beta_tilde = beta * (1 - abar_s) / (1 - abar) if timestep else first[1] * first[0] / (
        1 - (1 - first[0]) * (1 - first[1]))

    def posterior(x0, x_t):
        return (abar_s ** 0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - abar_s) * x_t) / (1 - abar)

    def cdf(z):
        return 0.5 * (1 + math.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z ** 3)))

    total = 0
    for x, e, e_hat, f in zip(x0.flatten().tolist(), eps.flatten().tolist(), out[:, 0].flatten().tolist(),
                              out[:, 1].flatten().tolist()):
        x_t = abar ** 0.5 * x + (1 - abar) ** 0.5 * e
        mean = posterior((x_t - (1 - abar) ** 0.5 * e_hat) / abar ** 0.5, x_t)
        std = math.exp(0.5 * ((f + 1) / 2 * math.log(beta) + (1 - f) / 2 * math.log(beta_tilde)))
        if timestep:
            p = torch.distributions.Normal(mean, std)
            q = torch.distributions.Normal(posterior(x, x_t), beta_tilde ** 0.5)
            nats = torch.distributions.kl_divergence(q, p).item()
        else:
            above, below = cdf((x + 1 / 255 - mean) / std), cdf((x - 1 / 255 - mean) / std)
            nats = -math.log(max(1e-12, (1 if x == 1 else above) - (0 if x == -1 else below)))
        total += ((e_hat - e) ** 2 + nats / math.log(2)) / 4
    model = Says(out)
    loss, repa, atta = haste.losses(model, x0, eps, torch.tensor([(timestep + 0.5) / 1000]),
                                    torch.tensor([1]))
    assert loss.item() == pytest.approx(total, rel=1e-5) and model.t.tolist() == [timestep] and not repa
    assert not atta
    loss.backward()     # in the bound eps_hat is detached: it learns from the squared error alone
    assert torch.allclose(model.out.grad[:, :1], (out[:, :1] - eps) / 2, rtol=1e-12)
    assert model.out.grad[:, 1:].any()


@pytest.mark.parametrize("steps", [250, 50, 21, 1000])
def test_the_respaced_schedule_against_a_naive_one(steps):
    kept, at = [], 0.0
    for _ in range(steps):
        kept.append(round(at))
        at += 999 / (steps - 1)
    abars = [math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(t + 1)) for t in kept]
    timesteps, rows = haste.ddpm_schedule(steps, torch.device("cpu"), torch.float64)
    assert timesteps == kept and rows.shape == (6, steps)
    for i in (1, 2, steps // 2, steps - 1):
        before, abar = abars[i - 1], abars[i]
        keep = abar / before        # x_t = sqrt(keep) x_s + sqrt(1 - keep) noise
        # by Bayes: precisions add, and so do the precision-weighted means
        precision = keep / (1 - keep) + 1 / (1 - before)
        by_hand = [abar ** 0.5, (1 - abar) ** 0.5, before ** 0.5 / (1 - before) / precision,
                   keep ** 0.5 / (1 - keep) / precision, math.log(1 - keep), -math.log(precision)]
        assert rows[:, i].tolist() == pytest.approx(by_hand, rel=1e-9)
    assert rows[2:4, 0].tolist() == pytest.approx([1, 0], abs=1e-12) and rows[5, 0] == rows[5, 1]
    with pytest.raises(haste.BadInput, match="2 to 1000 steps"):
        haste.ddpm_schedule(1001, torch.device("cpu"), torch.float64)


class GaussianNoise(nn.Module):
    """The exact noise in data from N(0, c^2), E[eps | x_t], of label 0; half of it for the null label."""
    null_label, diffusion, guided, c = 3, haste.DDPM, 3, 0.5

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item(), y.tolist()))
        signal, noise, *_ = haste.ddpm_at(t.long(), x.double())
        half = torch.where(y == 3, 0.5, 1.0).view(-1, 1, 1, 1)
        eps = noise / (signal ** 2 * self.c ** 2 + noise ** 2) * x * half
        return torch.cat([eps, -torch.ones_like(eps)], dim=1).to(x.dtype)


def test_dits_samplers_turn_noise_into_data():
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(4, dtype=torch.long)
    ode = haste.sample(GaussianNoise(), noise, labels, mode="ode")
    # the flow of a Gaussian is a scaling
    assert (ode - 0.5 * noise.double()).abs().max() < 0.05 and ode.dtype == torch.float64
    for mode in ("ddpm", "sde"):
        model = GaussianNoise()
        torch.manual_seed(0)
        x = haste.sample(model, noise, labels, mode=mode)
        assert x.std().item() == pytest.approx(0.5, abs=0.03)
        assert torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1] < 0.2
        timesteps, _ = haste.ddpm_schedule(250, noise.device, torch.float64)
        assert [t for _, t, _ in model.calls] == timesteps[::-1]
    with pytest.raises(haste.BadInput, match="ddpm, sde, ode"):
        haste.sample(GaussianNoise(), noise, labels, mode="heun")
    with pytest.raises(haste.BadInput, match="sde, ode, heun"):
        haste.sample(GaussianVelocity(), noise, labels, mode="ddpm")


@pytest.mark.parametrize("mode", ["ddpm", "sde", "ode"])
def test_dit_guides_three_channels_inside_the_interval(mode):
    noise, labels = torch.randn(2, 4, 4, 4), torch.zeros(2, dtype=torch.long)
    free, guided, model = GaussianNoise(), GaussianNoise(), GaussianNoise()
    torch.manual_seed(0)
    x = haste.sample(free, noise, labels, steps=10, mode=mode)
    torch.manual_seed(0)
    g = haste.sample(guided, noise, labels, steps=10, cfg_scale=3.0, mode=mode)
    assert torch.equal(x[:, 3], g[:, 3]) and ((x - g)[:, :3].abs() > 0).all()
    haste.sample(model, noise, labels, steps=10, cfg_scale=3.0, guidance=(0.3, 0.7), mode=mode)
    assert all((n, y) == ((4, [0, 0, 3, 3]) if 300 <= t <= 700 else (2, [0, 0])) for n, t, y in model.calls)
    assert len(model.calls) == 10


def test_dits_names_taus_and_mistakes(world, tmp_path, capsys):
    class At512(list):
        shape, resolution, classes, labels, images = (4, 64, 64), 512, range(9), np.zeros(256), []
        captions = None

    settled = {}
    for name in ("SiT-XL/2", "DiT-XL/2", "DiT-L/2", "DiT-B/4"):
        args = haste.parse(["--model", name])
        haste.settle(args, At512(range(256)), 1)
        settled[name] = args.tau
    assert settled == {"SiT-XL/2": 300_000, "DiT-XL/2": 250_000, "DiT-L/2": 250_000, "DiT-B/4": 100_000}
    assert "unknown model 'DiT'" in complaint(capsys, ["--model", "DiT", "--data-dir", world / "data"])


def test_a_dit_is_trained_in_both_phases_resumed_bit_for_bit_and_drawn(tiny, world, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    haste.main(flags(world, whole, model="DiT-XS/2", sampling_steps=6))
    haste.main(flags(world, parts, model="DiT-XS/2", max_train_steps=4))
    haste.main(flags(world, parts, model="DiT-XS/2"))
    assert all(same(checkpoint(whole, 6)[k], checkpoint(parts, 6)[k]) for k in ("model", "ema", "opt"))
    assert [m["phase"] for m in metrics(whole)] == [1, 1, 1, 2, 2, 2] and metrics(whole)[0]["loss_atta"] > 0
    # by "ddpm", for "ode" is not for young DiTs
    assert (whole / "run" / "samples" / "0000006.png").is_file()
    path, pictures = whole / "run" / "checkpoints" / "0000006.pt", {}
    for mode in ("ddpm", "sde", "ode"):
        haste.main(["--sample", f"{path}", "--labels", "0", "3", "--num-steps", "4", "--mode", mode, "--out",
                    f"{tmp_path}/{mode}.png"])
        pictures[mode] = (tmp_path / f"{mode}.png").read_bytes()
    assert len(set(pictures.values())) == 3
    assert "ddpm, sde, ode" in complaint(capsys, ["--sample", path, "--labels", 0, "--mode", "heun"])
    assert "at most 1000 steps" in complaint(capsys, ["--sample", path, "--labels", 0, "--num-steps", 1001])
    draw = ("--ckpt", f"{path}", "--ref", f"{world}/data", "--num-samples", "8", "--num-steps", "3",
            "--inception", "random")
    results = evaluate.main([*draw, "--mode", "ddpm", "--cfg-scale", "2", "--json", f"{tmp_path}/told.json"])
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["protocol"]["sampler"] == "ddpm" and told["protocol"]["guided channels"] == 3
    assert results["fid"] == told["fid"]
    assert "ddpm, sde, ode" in refusal(capsys, *draw, "--mode", "heun")


@pytest.mark.parametrize("name, data", [("DiT-XS/2", "world/data"), ("MMDiT-XS/4", "coco/txt-data")])
def test_the_trigger_asks_the_other_backbones_too(world, coco, tmp_path, name, data):
    folder = {"world": world, "coco": coco}[data.split("/")[0]] / data.split("/")[1]
    haste.main(flags(world, tmp_path, model=name, data_dir=folder, tau="auto", tau_from=0, tau_every=2,
                     tau_images=8, max_train_steps=2))
    assert all(f"cosine_t{t}" in metrics(tmp_path)[0] for t in haste.TRIGGER_TIMES)


def test_dits_own_checkpoints_load_without_a_projector(tmp_path, capsys):
    model = awake(haste.build_model("DiT-S/8", input_size=16, num_classes=3))
    bare = {k: x for k, x in model.state_dict().items() if not k.startswith("projectors")}
    torch.save(bare, tmp_path / "bare.pt")
    torch.save({"ema": bare, "args": argparse.Namespace(model="DiT-S/8", num_classes=3, vae="ema")},
               tmp_path / "trained.pt")
    x, t, y = torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.tensor([3])
    for path, name in ((tmp_path / "bare.pt", "DiT-S/8"), (tmp_path / "trained.pt", None)):
        loaded, made = haste.load_model(path, name)
        assert torch.equal(loaded(x, t, y), model(x, t, y)) and loaded.null_label == 3
    assert made["vae"] == "stabilityai/sd-vae-ft-ema"
    assert "as a DiT's: --model DiT-XL/2?" in complaint(capsys, ["--sample", tmp_path / "bare.pt"])
    sit = {k: x for k, x in haste.build_model("SiT-S/8", input_size=16).state_dict().items()
           if not k.startswith("projectors")}
    torch.save(sit, tmp_path / "sit.pt")
    for kind, why in (("SiT", "KeyError: 'projectors"), ("DiT", "holds no weights")):
        assert why in complaint(capsys, ["--sample", tmp_path / "sit.pt", "--model", f"{kind}-S/8"])


@pytest.mark.parametrize("kind", [haste.SiT, haste.DiT, haste.MMDiT])
def test_the_benchs_plain_step_is_phase_iis(kind):
    args = haste.parse(["--precision", "fp32"])
    args.gradient_accumulation_steps = 1
    learners = []
    for one in (type("PlainBackbone", (evaluate.Plain, kind), {}), kind):
        torch.manual_seed(0)
        sizes = {k: x for k, x in TINY.items() if k != "num_classes" or kind is not haste.MMDiT}
        learners.append(haste.Learner(awake(one(**sizes)), args, torch.device("cpu")))
        learners[-1].wrap(projector=False)
    given = (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([0.0004, 0.7]),
             torch.tensor([0, 4]))
    given = (*given[:3], torch.randn(2, 5, 768)) if kind is haste.MMDiT else given
    for _ in range(2):
        evaluate.plain_step(learners[0], *given)
        learners[1].step(*given)
    for a, b in zip(learners[0].model.parameters(), learners[1].model.parameters()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_released_mmdits_figures_for_the_same_weights():
    """Output, projection, logits and gradients of the authors' text-to-image model,
    executed on numpy's frozen streams."""
    model = with_frozen_weights(haste.MMDiT(hidden_size=288, depth=9, num_heads=9, teacher_dim=48,
                                            projector_dim=96))
    v, z, qk = model(frozen(1, 2, 4, 32, 32), torch.tensor([0.3, 0.8]), frozen(2, 2, 7, 768), align=True)
    assert v[0, :, 5, 9].tolist() == pytest.approx([-1.149736, -0.551603, 1.262833, -1.376827], rel=1e-4)
    assert v.abs().mean().item() == pytest.approx(0.852266, rel=1e-4)
    assert z[0, 17, :3].tolist() == pytest.approx([0.203212, -0.38475, -0.734253], rel=1e-4)
    q, k = qk[2]
    assert (q @ k.mT / 32 ** 0.5)[1, 3, 10, :3].tolist() == pytest.approx(
        [0.281714, 1.998466, -0.598364], rel=1e-4)
    v.square().mean().backward()
    grads = {"context_embedder.weight": 0.066919, "joint_blocks.8.context_block.attn.qkv.weight": 0.020626,
             "joint_blocks.5.x_block.attn.qkv.weight": 0.395535}
    assert {n: dict(model.named_parameters())[n].grad.norm().item() for n in grads} == pytest.approx(
        grads, rel=1e-4)


def test_mmdits_parameter_counts_and_names():
    with torch.device("meta"):
        model = haste.build_model("MMDiT")
    params = dict(model.named_parameters())
    assert sum(p.numel() for p in params.values()) == 512_415_504
    assert sum(p.numel() for n, p in params.items() if not n.startswith("projectors")) == 505_070_608
    assert [n for n, _ in model.named_children()] == ["x_embedder", "t_embedder", "context_embedder",
                                                      "joint_blocks", "final_layer", "projectors"]
    # the last text feeds attention, and ends
    assert [n for n in params if n.startswith("joint_blocks.23.context_block")] == [
        f"joint_blocks.23.context_block.{layer}.{kind}" for layer in ("attn.qkv", "adaLN_modulation.1")
        for kind in ("weight", "bias")]
    assert "pos_embed" in model.state_dict() and "null_context" not in model.state_dict()


def test_mmdit_shows_the_image_side_of_the_maps_that_attention_used(monkeypatch):
    model, used = awake(tiny_mmdit()), []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: used.append((q, k))
                        or real(q, k, v))
    x, t, context = torch.randn(3, 3, 8, 8), torch.rand(3), torch.randn(3, 5, 12)
    v, z, qk = model(x, t, context, align=True)
    assert v.shape == x.shape and z.shape == (3, 16, 24) and len(used) == 10 and len(qk) == 4
    assert torch.equal(v, model(x, t, context))
    for b, (q, k) in zip(model.attention_blocks, qk):
        assert q.shape == k.shape == (3, 4, 16, 8) and used[b][0].shape == (3, 4, 5 + 16, 8)
        # text comes first
        assert torch.equal(used[b][0][:, :, 5:], q) and torch.equal(used[b][1][:, :, 5:], k)


def test_mmdit_by_hand_text_and_image_in_one_attention():
    block = haste.JointBlock(32, 4, last=False)
    x, c, text = torch.randn(2, 16, 32), torch.randn(2, 32), torch.randn(2, 5, 32)
    parts = []
    for stream, h in ((block.context_block, text), (block.x_block, x)):
        m = stream.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        qkv = stream.attn.qkv(F.layer_norm(h, (32,), eps=1e-6) * (1 + m[1]) + m[0])
        parts.append((stream, h, m, qkv.chunk(3, dim=-1)))
    q, k, v = (torch.cat([p[3][i] for p in parts], dim=1) for i in range(3))
    heads = [((q[..., s] @ k[..., s].mT) / 8 ** 0.5).softmax(-1) @ v[..., s]
             for s in (slice(8 * i, 8 * i + 8) for i in range(4))]
    results = []
    for (stream, h, m, _), a in zip(parts, torch.cat(heads, dim=-1).split([5, 16], dim=1)):
        h = h + m[2] * stream.attn.proj(a)
        results.append(h + m[5] * stream.mlp(F.layer_norm(h, (32,), eps=1e-6) * (1 + m[4]) + m[3]))
    out, _, text_out = block(x, c, text)
    assert torch.allclose(text_out, results[0], atol=1e-5) and torch.allclose(out, results[1], atol=1e-5)


def test_the_text_is_never_supervised():
    model = tiny_mmdit()
    x0, eps, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.rand(2)
    context = torch.randn(2, 5, 12)
    target = haste.Teacher(tiny_vit(), (8, 9, 10, 11), 4)(
        torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    diff, repa, atta = haste.losses(model, x0, eps, t, context, target)
    atta.backward(retain_graph=True)
    text = [(int(n.split(".")[1]), n, p) for n, p in model.named_parameters() if ".context_block." in n]
    # block 7 shows its image's q and k, and no more
    assert all(p.grad is None for block, _, p in text if block >= 7)
    # image attended to text on the way
    assert all(p.grad is not None and p.grad.any() for block, n, p in text if block < 6)
    assert any(p.grad.any() for n, p in model.named_parameters()
               if n.startswith("joint_blocks.7.x_block.attn.qkv"))
    model.zero_grad()
    # the tokens after block 8, block 7 from 0: its text only feeds attention there
    repa.backward(retain_graph=True)
    after = [n for block, n, p in text if block == 7 and p.grad is not None and p.grad.any()
             and ".attn.qkv" not in n and ".adaLN" not in n]
    assert not after and all(p.grad is None for block, _, p in text if block > 7)
    model.zero_grad()
    diff.backward()
    # no parameter is unused: DDP need not search for any
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("projectors"))
    turned = model(x0, t, context.flip(1))
    assert torch.allclose(turned, model(x0, t, context), atol=1e-5)          # text tokens have no positions


def test_mmdit_drops_texts_to_the_empty_one_and_is_guided_away_from_it():
    model = awake(tiny_mmdit())
    noise, context, null = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 12), torch.randn(5, 12)
    with pytest.raises(haste.BadInput, match="empty text"):
        haste.sample(model, noise, context, steps=2, cfg_scale=2.0, mode="ode")
    model.null_context = null
    assert "null_context" not in model.state_dict()
    many = model.drop(context[:1].expand(20_000, 5, 12),
                      torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    dropped = (many == null).flatten(1).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(many[~dropped][0], context[0])
    x, t = noise, torch.ones(2)
    by_hand = x.double() - (lambda v, v_null: v_null + 2 * (v - v_null))(
        model(x, t, context).double(), model(x, t, null.expand(2, 5, 12)).double())
    with torch.no_grad():
        out = haste.sample(model, noise, context, steps=1, cfg_scale=2.0, mode="ode")
    assert torch.allclose(out, by_hand, atol=1e-5)
    halves = haste.sample(model, noise, context.half(), steps=1, mode="ode")     # texts are stored in fp16
    assert torch.allclose(halves, haste.sample(model, noise, context.half().float(), steps=1, mode="ode"))


@pytest.fixture(scope="module")
def coco(world, tmp_path_factory):
    """12 of the world's images with 1 to 5 captions each, by a JSON as COCO's, and by a text file beside
    each; prepared from both."""
    home = tmp_path_factory.mktemp("coco")
    images, annotations, pictures = [], [], sorted((world / "images").rglob("*.png"))[:12]
    for i, path in enumerate(pictures):
        texts = [f"a picture {path.stem} told {k}" for k in range(1 + int(path.stem) % 5)]
        for folder in ("json", "txt"):
            (home / folder).mkdir(exist_ok=True)
            (home / folder / path.name).write_bytes(path.read_bytes())
        (home / "txt" / f"{path.stem}.txt").write_text("\n".join(texts) + "\n")
        images.append({"id": 7 * i, "file_name": path.name})
        annotations += [{"image_id": 7 * i, "id": 100 * i + k, "caption": f"{text} \n"}
                        for k, text in enumerate(texts)]
    (home / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations[::-1]}))
    for kind, more in (("json", ["--captions", f"{home}/captions.json"]), ("txt", [])):
        haste.main(["--prepare", f"{home}/{kind}", "--data-dir", f"{home}/{kind}-data", "--resolution", "8",
                    "--vae", "none", "--text-encoder", "words", "--num-workers", "0", *more])
    return home


@pytest.fixture(scope="module")
def painter(world, coco, tmp_path_factory):
    """The folder of an MM-DiT's run over these captions."""
    out = tmp_path_factory.mktemp("painter")
    haste.main(flags(world, out, model="MMDiT-XS/4", data_dir=coco / "txt-data", sampling_steps=6))
    return out


def test_captions_are_encoded_once_with_the_empty_one(coco):
    for kind, turn in (("txt", 1), ("json", -1)):
        data = haste.Data(coco / f"{kind}-data")
        names = json.loads((coco / f"{kind}-data" / "files.json").read_text())
        contexts = np.load(coco / f"{kind}-data" / "contexts.npy")
        assert torch.equal(data.captions.empty, haste.Words()([""])[0].half()) and data.vae is None
        texts = [[f"a picture {name[:2]} told {k}" for k in range(1 + int(name[:2]) % 5)][::turn]
                 for name in names]
        assert contexts.shape == (sum(map(len, texts)), 12, 768) and contexts.dtype == np.float16
        assert len(names) == 12
        want = torch.cat([haste.Words()(each) for each in texts]).half().numpy()
        assert np.array_equal(contexts, want)
        for u in (0.0, 0.5, 0.999):
            batch = data[np.arange(12), True, np.full(12, u)]
            wanted = [haste.Words()([each[int(u * len(each))]])[0].half() for each in texts]
            assert torch.equal(batch["labels"], torch.stack(wanted))
            assert batch["images"].shape == (12, 3, 8, 8)
        assert torch.equal(data[np.arange(12), False]["labels"],
                           data[np.arange(12), False, np.zeros(12)]["labels"])


def test_which_caption_is_shown_depends_on_seed_step_and_place():
    def picks(rows, steps, seed=3):
        args = argparse.Namespace(batch_size=6, seed=seed)
        order = haste.requests(10, args, rows, steps, True)
        return [pick for *_, pick in haste.with_picks(order, args, rows, steps)]

    whole, halves = picks(range(6), range(5)), [picks(slice(r * 3, r * 3 + 3), range(5)) for r in range(2)]
    assert np.array_equal(np.stack(whole), np.concatenate(halves, axis=1))
    assert np.array_equal(picks(range(6), range(3, 5)), whole[3:]) and len(set(np.concatenate(whole))) == 30
    assert not np.array_equal(picks(range(6), range(5), seed=4), whole)


def test_training_shows_more_than_an_images_first_caption(world, coco, tmp_path, monkeypatch):
    shown, real = set(), haste.Captions.encoded

    def encoded(self, slots, picks):
        shown.update(int(u * self.counts[i]) for i, u in zip(slots, picks))
        return real(self, slots, picks)

    monkeypatch.setattr(haste.Captions, "encoded", encoded)
    haste.main(flags(world, tmp_path, model="MMDiT-XS/4", data_dir=coco / "txt-data", tau=0))
    assert shown >= {0, 1, 2}


def test_an_mmdit_is_trained_in_both_phases_and_resumed_bit_for_bit(world, coco, painter, tmp_path):
    given = {"model": "MMDiT-XS/4", "data_dir": coco / "txt-data"}
    haste.main(flags(world, tmp_path, **given, max_train_steps=4))
    haste.main(flags(world, tmp_path, **given))
    whole, parts = checkpoint(painter, 6), checkpoint(tmp_path, 6)
    assert all(same(whole[k], parts[k]) for k in ("model", "ema", "opt", "null_context"))
    assert torch.equal(whole["null_context"], haste.Words()([""])[0].half())
    assert whole["args"]["text_encoder"] == "words"
    assert [m["phase"] for m in metrics(painter)] == [1, 1, 1, 2, 2, 2]
    assert metrics(painter)[0]["loss_atta"] > 0
    assert (painter / "run" / "samples" / "0000006.png").is_file()


def test_two_processes_train_an_mmdit_as_one_does(world, coco, painter, tmp_path):
    given = flags(world, tmp_path, model="MMDiT-XS/4", data_dir=coco / "txt-data")
    finish(launch(given, processes=2), 0)
    one, two = checkpoint(painter, 6)["model"], checkpoint(tmp_path, 6)["model"]
    assert all(torch.allclose(one[k], two[k], atol=2e-3) for k in one)


def test_captions_are_drawn_without_a_text_encoders_help_for_the_empty_one(
        painter, tmp_path, monkeypatch, capsys):
    path, encoded, real = painter / "run" / "checkpoints" / "0000006.pt", [], haste.Words.__call__
    monkeypatch.setattr(haste.Words, "__call__", lambda self, texts: encoded.append(texts)
                        or real(self, texts))
    draw = ["--sample", f"{path}", "--num-steps", "4", "--out", f"{tmp_path}/a.png", "--captions"]
    haste.main([*draw, "a red bus", "word " * 20])
    assert encoded == [["a red bus", "word " * 20]] and Image.open(tmp_path / "a.png").size == (2 * 9 + 1, 10)
    assert "1 of 2 captions are longer than 12 words: truncated" in capsys.readouterr().out
    assert "say --captions" in complaint(capsys, ["--sample", path, "--labels", 0])
    assert "say --captions" in complaint(capsys, ["--sample", path])


def test_evaluate_draws_one_caption_an_image(tiny, coco, painter, tmp_path, capsys):
    path = painter / "run" / "checkpoints" / "0000006.pt"
    given = ["--ckpt", f"{path}", "--ref", f"{coco}/txt-data", "--num-steps", "2", "--inception", "random",
             "--cfg-scale", "2"]
    evaluate.main([*given, "--num-samples", "30", "--captions-from", f"{coco}/txt-data", "--json",
                   f"{tmp_path}/a.json"])
    assert "the first of each image" in json.loads((tmp_path / "a.json").read_text())["protocol"]["labels"]
    args = evaluate.parse([*given, "--num-samples", "30", "--captions-from", f"{coco}/txt-data",
                           "--precision", "fp32"])
    generated = evaluate.Generated(args, torch.device("cpu"))
    assert sorted(generated.labels[:12]) == list(range(12))
    assert generated.conditions(range(3, 8)).shape == (5, 12, 768)
    # and once more from the start
    assert torch.equal(generated.conditions(range(3, 8)), generated.conditions(range(15, 20)))
    assert "say --captions-from" in refusal(capsys, *given)
    assert "not --balanced" in refusal(capsys, *given, "--captions-from", f"{coco}/txt-data", "--balanced")


def uvit_folder(home, n=8):
    """Features as U-ViT's scripts write them: float32, mean and log variance."""
    rng, folder = np.random.default_rng(0), home / "features" / "train"
    folder.mkdir(parents=True)
    for i in range(n):
        np.save(folder / f"{i}.npy", rng.standard_normal((8, 8, 8)).astype(np.float32))
        for k in range(1 + i % 3):
            np.save(folder / f"{i}_{k}.npy", rng.standard_normal((77, 768)).astype(np.float32))
    np.save(home / "features" / "empty_context.npy", rng.standard_normal((77, 768)).astype(np.float32))
    return folder


def test_uvits_features_train_as_they_are(world, tmp_path, capsys):
    folder = uvit_folder(tmp_path)
    data = haste.Data(folder)
    batch, raw = data[np.array([5, 2]), False, np.array([0.9, 0.4])], np.load(folder / "5.npy")
    assert torch.allclose(batch["moments"][0],
                          torch.from_numpy(np.concatenate([raw[:4], np.exp(raw[4:] / 2)])))
    assert np.array_equal(batch["labels"], [np.load(folder / "5_2.npy"), np.load(folder / "2_1.npy")])
    assert np.array_equal(data.captions.empty, np.load(tmp_path / "features" / "empty_context.npy"))
    assert (data.vae, data.scale, data.shape, data.resolution, len(data)) == (
        haste.VAE_ENCODER, 0.18215, (4, 8, 8), 64, 8)
    given = flags(world, tmp_path, data_dir=folder, model="MMDiT-XS/4")
    assert "has none: put them there as images/0.png" in complaint(capsys, given)
    haste.main(flags(world, tmp_path, data_dir=folder, model="MMDiT-XS/4", tau=0, max_train_steps=2))
    (folder / "images").mkdir()
    for i in range(8):
        Image.fromarray(np.full((64, 64, 3), i, np.uint8)).save(folder / "images" / f"{i}.png")
    batch = haste.Data(folder)[np.array([7, 3]), True]
    assert batch["images"].flatten(1).unique(dim=1).tolist() == [[7], [3]]
    haste.main(flags(world, tmp_path, data_dir=folder, model="MMDiT-XS/4", exp_name="aligned", num_workers=1))
    assert metrics(tmp_path, "aligned")[0]["loss_atta"] > 0
    Image.new("RGB", (64, 60)).save(folder / "images" / "7.png")
    odd = flags(world, tmp_path, data_dir=folder, model="MMDiT-XS/4", exp_name="odd")
    assert "7.png is not 64 x 64" in complaint(capsys, odd)
    (folder / "images" / "7.png").unlink()
    assert "8 latents and 7 images" in complaint(capsys, given)
    (folder / "images").rename(tmp_path / "away")
    whole = (folder / "6_0.npy").read_bytes()
    (folder / "6_0.npy").write_bytes(whole[:1000])
    torn = flags(world, tmp_path, data_dir=folder, model="MMDiT-XS/4", exp_name="torn", tau=0)
    assert "6_0.npy cannot be read" in complaint(capsys, torn)
    empty = tmp_path / "features" / "empty_context.npy"
    empty.rename(tmp_path / "empty_context.npy")
    assert "it comes with U-ViT's features" in complaint(capsys, torn)
    (tmp_path / "empty_context.npy").rename(empty)
    (folder / "6_0.npy").unlink()
    assert "look at number 6" in complaint(capsys, given)
    (folder / "3.npy").unlink()
    assert "7 latents must be 0.npy to 6.npy" in complaint(capsys, given)


def test_mistakes_with_captions(world, coco, tmp_path, capsys):
    assert "learns from captions, and" in complaint(capsys, flags(world, tmp_path, model="MMDiT-XS/4"))
    assert "say --model MMDiT" in complaint(capsys, flags(world, tmp_path, data_dir=coco / "txt-data"))
    for flag in ("captions", "text_encoder"):
        assert "go with --prepare or --sample" in complaint(capsys, flags(world, tmp_path, **{flag: "words"}))
    prepare = preparing(coco / "json", tmp_path / "d", "--text-encoder", "words")
    told = json.loads((coco / "captions.json").read_text())
    told["annotations"] = [a for a in told["annotations"] if a["image_id"]]
    (tmp_path / "lacking.json").write_text(json.dumps(told))
    (tmp_path / "other.json").write_text('{"images": [{"id": 1}], "annotations": []}')
    for file, why in (("lacking", "1 of 12 images have no caption in"), ("none", "cannot be read"),
                      ("other", "not the structure of COCO's")):
        assert why in complaint(capsys, [*prepare, "--captions", tmp_path / f"{file}.json"])
    assert "takes one file" in complaint(capsys, [*prepare, "--captions", "a", "b"])
    assert "has no text files beside its images" in complaint(capsys, prepare)
    prepare[1] = tmp_path / "txt"
    shutil.copytree(coco / "txt", prepare[1])
    next(prepare[1].glob("*.txt")).write_text(" \n")
    assert "1 of 12 images have no caption in a text file beside it" in complaint(capsys, prepare)
    assert not (tmp_path / "d").exists()
    haste.main(flags(world, tmp_path, max_train_steps=1))
    path = tmp_path / "run" / "checkpoints" / "0000001.pt"
    assert "draws labels, not captions" in complaint(capsys, ["--sample", path, "--captions", "a red bus"])
    draw = "--ckpt", path, "--ref", world / "data", "--num-samples", 4
    assert "leave --captions-from out" in refusal(capsys, *draw, "--captions-from", coco / "txt-data")


def make_clip(folder, width=768):
    """A CLIP of one block, text and image, whose words are single letters, as transformers keeps it."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt").save_pretrained(folder)
    torch.manual_seed(0)
    one = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 12}
    text = dict(one, vocab_size=len(words), hidden_size=width, bos_token_id=len(words) - 2,
                eos_token_id=len(words) - 1)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=dict(one, hidden_size=12, image_size=8, patch_size=4)))
    model.save_pretrained(folder)
    return model


def test_clip_encodes_what_is_prepared_and_sampled(world, coco, tmp_path, capsys, monkeypatch):
    clip, src = make_clip(tmp_path / "clip"), tmp_path / "src"
    shutil.copytree(coco / "txt", src)
    names = sorted(path.stem for path in src.glob("*.txt"))
    (src / f"{names[3]}.txt").write_text(f"{'abc ' * 60}\nab\n")
    count = sum(len(path.read_text().splitlines()) for path in src.glob("*.txt"))
    prepare = ["--prepare", f"{src}", "--data-dir", f"{tmp_path}/data", "--resolution", "8", "--vae", "none",
               "--num-workers", "0"]
    haste.main([*prepare, "--text-encoder", f"{tmp_path}/clip"])
    out = capsys.readouterr().out
    assert f"12 images with {count} captions" in out
    assert f"1 of {count} captions are longer than 77 tokens: truncated" in out
    data = haste.Data(tmp_path / "data")
    start, end, a, b = 52, 53, 0, 26 + 1
    ids = torch.tensor([[start, a, b] + [end] * 74])
    with torch.no_grad():
        want = clip.text_model(ids).last_hidden_state[0].half()
    assert np.allclose(data.captions.read(3, 1), want, atol=2e-3)
    assert data.captions.empty.shape == (77, 768)
    haste.main(flags(world, tmp_path, data_dir=tmp_path / "data", model="MMDiT-XS/4", max_train_steps=1))
    draw = ["--sample", f"{tmp_path}/run/checkpoints/0000001.pt", "--num-steps", "2", "--out",
            f"{tmp_path}/a.png", "--captions", "a b"]
    haste.main(draw)
    assert "leave --text-encoder out" in complaint(capsys, [*draw, "--text-encoder", "words"])
    # of other code, without the empty caption
    torch.save(checkpoint(tmp_path, 1)["ema"], tmp_path / "bare.pt")
    bare = ["--sample", f"{tmp_path}/bare.pt", "--model", "MMDiT-XS/4", "--vae", "none", *draw[2:]]
    haste.main([*bare, "--text-encoder", f"{tmp_path}/clip"])
    make_clip(tmp_path / "narrow", 48)
    prepare[3] = f"{tmp_path}/other"
    assert "gives 48 numbers a token" in complaint(capsys, [*prepare, "--text-encoder", tmp_path / "narrow"])
    assert "could not be loaded" in complaint(capsys, [*prepare, "--text-encoder", tmp_path / "none"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in complaint(capsys, [*prepare, "--text-encoder", tmp_path / "clip"])


@pytest.mark.parametrize("make, condition", [
    (tiny_sit, torch.tensor([0, 4])), (tiny_dit, torch.tensor([0, 4])), (tiny_mmdit, torch.ones(2, 5, 12))])
def test_every_backbone_compiles_without_a_graph_break_in_both_phases(make, condition):
    model = awake(make())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.0, 7.0])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, t, condition), model(x, t, condition))
    assert torch.allclose(compiled(x, t, condition, align=True)[1], model(x, t, condition, align=True)[1])


@pytest.mark.parametrize("make, condition",
                         [(tiny_dit, torch.tensor([0, 4])), (tiny_mmdit, torch.ones(2, 5, 12))])
def test_the_trigger_measures_the_other_backbones_feature_block(make, condition):
    model = awake(make())
    x0, eps = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    target = haste.Teacher(tiny_vit(), range(len(model.attention_blocks)), 4)(
        torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    cosine = haste.gradient_cosine(model, 0.5, [(1.0, x0, eps, condition, target)], 0.5, 2.0)
    diff, repa, atta = haste.losses(model, x0, eps, torch.full((2,), 0.5), condition, target)
    block = [p for n, p in model.named_parameters()
             if n.split(".")[:2] in (["blocks", str(model.feature_block - 1)],
                                     ["joint_blocks", str(model.feature_block - 1)])]
    def gradient(loss):
        each = torch.autograd.grad(loss, block, retain_graph=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in each])

    a, b = gradient(0.5 * repa + 2 * atta), gradient(diff)
    assert cosine == pytest.approx(F.cosine_similarity(a, b, dim=0).item(), abs=1e-5)


# ---- 11. The command line: defaults; mistakes get one sentence and exit code 2 -----------------------------

def test_the_defaults_are_the_papers():
    args = haste.parse(["--precision", "fp32"])
    paper = {"model": "SiT-XL/2", "teacher": "dinov2_vitb14", "batch_size": 256, "learning_rate": 1e-4,
             "max_grad_norm": 1.0, "ema_decay": 0.9999, "cfg_prob": 0.1, "lambda_r": 0.5, "lambda_a": 0.5,
             "tau_from": 50_000, "tau_every": 10_000, "tau_images": 2048, "tau_cosine": -0.05}
    assert {name: vars(args)[name] for name in paper} == paper
    adam, = haste.Learner(tiny_sit(), args, torch.device("cpu")).optimizer.param_groups
    assert (adam["betas"], adam["weight_decay"]) == ((0.9, 0.999), 0)
    deep = (4, 5, 6, 7), (8, 9, 10, 11), 8, 2048
    assert haste.MODELS["B"] == (12, 768, 12, (2, 3, 4), (7, 9, 11), 5, 2048, 100_000)
    assert haste.MODELS["L"] == (24, 1024, 16, *deep, 250_000)
    assert haste.MODELS["XL"] == (28, 1152, 16, *deep, 250_000)
    assert haste.MODELS["MMDiT"] == (24, 768, 24, *deep, 200_000)
    fid = evaluate.parse(["--ckpt", "a.pt", "--ref", "b.npz"])
    assert (fid.num_samples, fid.mode, fid.num_steps, fid.cfg_scale) == (50_000, "sde", 250, 1.0)
    assert not fid.balanced


@pytest.mark.parametrize("wrong, sentence", [
    (dict(data_dir="/nowhere"), "--prepare"), (dict(model="SiT-H/2"), "unknown model 'SiT-H/2'"),
    (dict(teacher="dinov3"), "unknown teacher 'dinov3'"), (dict(teacher="timm/no_such_vit"), "no_such_vit"),
    (dict(model="SiT-XS/8", resolution=16), "--resolution 16"), (dict(batch_size=64), "has 40 images"),
    (dict(tau="soon"), "'soon' is neither"), (dict(tau=-1), "neither a number"),
    (dict(batch_size=9, gradient_accumulation_steps=2), "does not divide"),
    (dict(num_classes=3), "has the label 3"), (dict(attention_blocks=[1, 2]), "as many"),
    (dict(attention_blocks=[1, 2, 6]), "lacks one of the attention blocks"),
    (dict(teacher_blocks=[1, 2, 12]), "lacks one of the blocks"), (dict(lambda_r=0, lambda_a=0), "--tau 0"),
    (dict(learning_rate="fast"), "--learning-rate"), (dict(batch_size=0), "at least 1"),
    (dict(precision="int8"), "--precision"), (dict(ema_decay=1.5), "--ema-decay"),
    (dict(encoder_depth=7), "feature block 7"),
    (dict(no_such_flag=1), "--no-such-flag"), (dict(guidance_low=0.7, guidance_high=0.3), "--guidance-low"),
    (dict(learning_rate="nan"), "--learning-rate"),
])
def test_a_mistake_in_the_flags(world, tmp_path, capsys, wrong, sentence):
    assert sentence in complaint(capsys, flags(world, tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test asks in vain for")
def test_cuda_asked_for_and_absent(world, tmp_path, capsys):
    assert "--device cuda" in complaint(capsys, flags(world, tmp_path / "out", device="cuda"))


def test_mistakes_in_data_and_files(world, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    assert "is empty or missing" in complaint(capsys, flags(world, out, data_dir=tmp_path / "empty"))
    assert "no such folder" in complaint(capsys, ["--prepare", tmp_path / "nothing", "--data-dir", out])
    assert "class folders" in complaint(capsys, preparing(tmp_path / "empty", out))
    (tmp_path / "hubconf.py").write_text(HUB)
    hub = complaint(capsys, flags(world, out, teacher="dinov2_vits14", teacher_repo=tmp_path))
    assert "dinov2_vits14_pretrain.pth" in hub and torch.hub.get_dir() in hub and "no route" in hub
    assert "cannot be read" in complaint(capsys, ["--sample", tmp_path / "no.pt"])
    (tmp_path / "torn.pt").write_bytes(b"PK\3\4 torn")
    assert "torn.pt cannot be read" in complaint(capsys, ["--sample", tmp_path / "torn.pt"])
    assert not out.exists()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in complaint(capsys, ["--prepare", world / "images", "--data-dir", out])
    bench = ["--bench", "--model", "SiT-XS/4"]
    assert "must be as many" in complaint(capsys, [*bench, "--teacher-blocks", 9, 10])
    assert "unknown teacher 'typo.pt'" in complaint(capsys, [*bench, "--teacher", "typo.pt"])
    monkeypatch.setitem(sys.modules, "evaluate", None)
    assert "evaluate.py beside haste.py" in complaint(capsys, ["--demo"])
    (out / "checkpoints").mkdir(parents=True)
    assert "holds other things" in complaint(capsys, preparing(world / "images", out))
    other = preparing(world / "images", world / "data", "--resolution", 16)
    assert "other flags" in complaint(capsys, other)


def test_a_resolution_that_the_patch_size_does_not_divide(world, tmp_path, capsys):
    haste.main(preparing(world / "images", tmp_path / "data", "--resolution", 10))
    odd = flags(world, tmp_path / "out", data_dir=tmp_path / "data", model="SiT-XS/4")
    assert "cannot cut 10 x 10" in complaint(capsys, odd)
    with pytest.raises(haste.BadInput, match="patches of 4"):
        tiny_sit(input_size=10, patch_size=4)


def test_the_checkpoint_of_another_model_is_refused_and_kept(world, tmp_path, capsys):
    haste.main(flags(world, tmp_path, max_train_steps=2))
    path = tmp_path / "run" / "checkpoints" / "0000002.pt"
    before = path.read_bytes()
    assert "another model (SiT-XS/2)" in complaint(capsys, flags(world, tmp_path, model="SiT-S/4"))
    assert path.read_bytes() == before and len(metrics(tmp_path)) == 2
    assert "classes are 0 to 3" in complaint(capsys, ["--sample", path, "--labels", 4])
    path.write_bytes(before[:len(before) // 2])
    assert "cannot be read" in complaint(capsys, ["--sample", path])


# ---- 12. evaluate.py: the numbers of ADM's evaluator -------------------------------------------------------

SMALL = {"POOL": 24, "SPATIAL": 20, "LOGITS": 12}


class TinyInception(nn.Module):
    """Stands in for the Inception where the network is not what is tested: 24, 20 and 12 features."""

    def __init__(self, weights=None):
        super().__init__()
        self.register_buffer("w", torch.randn(12, 56, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        x = F.adaptive_avg_pool2d(images.float() / 64, 2).flatten(1)
        return (x @ self.w).sin().split([24, 20, 12], dim=1)


@pytest.fixture
def tiny(monkeypatch):
    """TinyInception in place of the Inception, one thread, and no waiting for the disk."""
    for name, value in {"Inception": TinyInception, **SMALL}.items():
        monkeypatch.setattr(evaluate, name, value)
    monkeypatch.setattr(os, "fsync", lambda f: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)        # at these sizes threads wait for one another more than they compute
    yield
    torch.set_num_threads(threads)


def score(*argv):
    return evaluate.main(["--num-workers", "0", *map(str, argv)])


def refusal(capsys, *argv):
    """The one sentence that a mistake gets on stderr, with exit code 2, and nothing measured."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        score(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "fid  " not in out and "Traceback" not in err, (out, err)
    *bars, said = err.splitlines()
    assert said.startswith("evaluate.py: ") and all("images/s" in bar for bar in bars if bar), err
    return said


def pictures(n, seed=0, shape=(8, 8, 3)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def write_pngs(folder, arrays):
    folder.mkdir(parents=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:04d}.png")


def features(images):
    """What TinyInception says of images (n, H, W, 3), as arrays."""
    return [x.double().numpy() for x in TinyInception()(torch.from_numpy(images).permute(0, 3, 1, 2))]


# The network

@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (32, 32), (299, 299), (300, 64), (512, 299)])
def test_the_resize_is_tensorflow_1s_to_the_bit(height, width):
    x, f = pictures(1, shape=(height, width))[0].astype(np.float32), np.float32
    got = evaluate.tf1_resize(torch.from_numpy(x)[None, None])[0, 0].numpy()
    assert got.shape == (299, 299) and got.dtype == np.float32
    for i in range(0, 299, 3):      # every third row is enough of a loop
        y = f(i) * f(height / 299)
        top, dy = int(y), y - f(int(y))
        bottom = min(top + 1, height - 1)
        for j in range(299):
            z = f(j) * f(width / 299)
            left, dx = int(z), z - f(int(z))
            right = min(left + 1, width - 1)
            above = x[top, left] + (x[top, right] - x[top, left]) * dx
            below = x[bottom, left] + (x[bottom, right] - x[bottom, left]) * dx
            assert got[i, j] == above + (below - above) * dy, (i, j)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """(the network of `--inception random`, a file with its weights as they were before the fusing)."""
    path, real = tmp_path_factory.mktemp("inception") / "weights.pth", evaluate.randomise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "randomise", lambda net: (real(net), torch.save(net.state_dict(), path)))
        return evaluate.Inception("random"), path


def plain_inception(net, images):
    """The FID Inception spelled out: timm's unfused convolutions, TensorFlow's pools, no bias."""
    def chain(m, x, *names):
        for name in names:
            x = getattr(m, name)(x)
        return x

    def mean_pool(x):       # the mean of those of the 3 x 3 that are in the image
        sums, counts = (9 * F.avg_pool2d(a, 3, 1, 1) for a in (x, torch.ones_like(x)))
        return sums / counts

    def block(m, x, pool, *branches):
        return torch.cat([chain(m, x, *b.split()) for b in branches] + [pool(x)], dim=1)

    def pooled(m, pool=mean_pool):
        return lambda x: m.branch_pool(pool(x))
    doubled = "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
    x = (evaluate.tf1_resize(images.float()) - 128) / 128
    x = F.max_pool2d(chain(net, x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"), 3, 2)
    x = F.max_pool2d(chain(net, x, "Conv2d_3b_1x1", "Conv2d_4a_3x3"), 3, 2)
    for m in (net.Mixed_5b, net.Mixed_5c, net.Mixed_5d):
        x = block(m, x, pooled(m), "branch1x1", "branch5x5_1 branch5x5_2", doubled)
    x = block(net.Mixed_6a, x, lambda x: F.max_pool2d(x, 3, 2), "branch3x3", doubled)
    for m in (net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e):
        x = block(m, x, pooled(m), "branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3",
                  " ".join(f"branch7x7dbl_{i}" for i in range(1, 6)))
        if m is net.Mixed_6d:
            spatial = x[:, :7]
    x = block(net.Mixed_7a, x, lambda x: F.max_pool2d(x, 3, 2), "branch3x3_1 branch3x3_2",
              " ".join(f"branch7x7x3_{i}" for i in range(1, 5)))
    for m, pool in ((net.Mixed_7b, mean_pool), (net.Mixed_7c, lambda x: F.max_pool2d(x, 3, 1, 1))):
        two, dbl = "branch3x3_1 branch3x3_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
        x = block(m, x, pooled(m, pool), "branch1x1", f"{two}a", f"{two}b", f"{dbl}a", f"{dbl}b")
    pool = x.mean((2, 3))
    spatial = np.stack([[[[image[c, h, w] for c in range(7)] for w in range(17)] for h in range(17)]
                        for image in spatial.numpy()])
    return pool, torch.from_numpy(spatial).reshape(len(x), -1), pool @ net.fc.weight.T


def close(got, wanted):
    """Within 1e-4 of the feature's scale, which is the bar; a constant feature would not count."""
    return [((a - b).abs().max() / b.abs().max()).item() < 1e-4 and b.std() > 0 for a, b in zip(got, wanted)]


@torch.no_grad()
def test_the_features_are_those_of_the_network_spelled_out(inception):
    with torch.device("meta"):
        net = evaluate.timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
    net.load_state_dict(torch.load(inception[1], weights_only=True), assign=True)
    images = torch.from_numpy(pictures(1, shape=(3, 40, 64)))
    wanted, loaded = plain_inception(net.eval(), images), evaluate.Inception(str(inception[1]))
    assert [x.shape[1] for x in wanted] == [2048, 2023, 1008]
    assert close(inception[0](images), wanted) == close(loaded(images), wanted) == [True] * 3
    unlike = net.forward_features((evaluate.tf1_resize(images.float()) - 128) / 128).mean((2, 3))
    assert close([unlike], wanted[:1]) == [False]       # timm's own pools would not do


@torch.no_grad()
def test_the_features_are_torch_fidelitys(inception):
    other = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception[1]))
    kept = {}
    other.Mixed_6d.branch1x1.register_forward_hook(lambda m, args, out: kept.update(out=out))
    for side in (32, 512):
        images = torch.from_numpy(pictures(1, shape=(3, side, side)))
        pool, logits = other.eval()(images)
        spatial = kept["out"][:, :7].permute(0, 2, 3, 1).flatten(1)
        assert close(inception[0](images), (pool, spatial, logits)) == [True] * 3


# The metrics

def test_moments_are_those_of_numpy_whatever_the_batches_and_add_up():
    x = np.random.default_rng(0).normal(5, 2, (100, 24)).astype(np.float32)
    whole, halves = evaluate.Moments(24, "cpu"), [evaluate.Moments(24, "cpu") for _ in range(2)]
    for start in range(0, 100, 30):
        whole.add(torch.from_numpy(x[start:start + 30]))
        halves[start % 60 // 30].add(torch.from_numpy(x[start:start + 30]))
    for name in ("n", "sum", "outer"):
        getattr(halves[0], name).add_(getattr(halves[1], name))
    wanted = x.astype(float).mean(0), np.cov(x.astype(float), rowvar=False)
    for moments in (whole, halves[0]):
        for got, want in zip(moments.statistics(), wanted):
            assert got.dtype == np.float64 and np.abs(got - want).max() < 1e-13 * np.abs(want).max()


def gaussian(n, d, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + seed
    return x.mean(0), np.cov(x, rowvar=False), x - x.mean(0)


def test_the_frechet_distance_is_exact_also_where_sqrtm_is_not():
    import scipy.linalg
    (mu1, s1, _), (mu2, s2, _) = gaussian(200, 30, 1), gaussian(150, 30, 2)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    wanted = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert evaluate.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(wanted, rel=1e-9)
    assert evaluate.frechet_distance(mu2, s2, mu1, s1) == pytest.approx(wanted, rel=1e-9)
    assert abs(evaluate.frechet_distance(mu1, s1, mu1, s1)) < 1e-9 * np.trace(s1)
    a, b = np.arange(30.0), np.arange(30.0)[::-1]       # they commute, and each lacks a rank
    wanted = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum() + 30
    got = evaluate.frechet_distance(a * 0, np.diag(a), b * 0 + 1, np.diag(b))
    assert got == pytest.approx(wanted, rel=1e-12)
    (mu1, s1, x), (mu2, s2, y) = gaussian(12, 30, 3), gaussian(9, 30, 4)        # ranks 11 and 8 of 30
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum() / math.sqrt(11 * 8)
    wanted = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * shared
    assert evaluate.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(wanted, rel=1e-6)


def naive_inception_score(logits, split):
    scores = []
    for part in (logits[i:i + split] for i in range(0, len(logits), split)):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(math.exp(np.mean([sum(q * (math.log(q) - math.log(m)) for q, m in zip(row, p.mean(0)))
                                        for row in p])))
    return np.mean(scores)


@pytest.mark.parametrize("n, split", [(20, 7), (21, 7), (5, 7)])
def test_the_inception_score_is_the_mean_over_splits_in_order(tiny, monkeypatch, n, split):
    monkeypatch.setattr(evaluate, "SPLIT", split)
    logits = np.random.default_rng(0).normal(0, 2, (n, 12))
    inception_score = evaluate.InceptionScore(n, "cpu")
    for rows in (range(0, n, 2), range(1, n, 2)):       # as two processes might see them
        inception_score.add(torch.from_numpy(logits[rows]), rows)
    assert inception_score.score() == pytest.approx(naive_inception_score(logits, split), rel=1e-12)


def test_the_inception_score_of_samples_sorted_by_class_collapses(tiny, monkeypatch):
    monkeypatch.setattr(evaluate, "SPLIT", 30)
    by_class = torch.eye(12).repeat_interleave(30, 0) * 50
    for logits, wanted in ((by_class, 1), (by_class.reshape(12, 30, 12).transpose(0, 1).flatten(0, 1), 12)):
        inception_score = evaluate.InceptionScore(360, "cpu")
        inception_score.add(logits, range(360))
        assert inception_score.score() == pytest.approx(wanted, rel=0.05)


def naive_precision(x, y, k=3):
    """The share of x that lies no farther from one of y than that one's k-th neighbour in y."""
    reach = [sorted(((a - b) ** 2).sum() for b in y)[k] for a in y]
    return np.mean([any(((a - b) ** 2).sum() <= r for b, r in zip(y, reach)) for a in x])


def test_precision_and_recall_are_those_of_loops_over_all_pairs():
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(at, 1, (n, 6)).round(2)) for at, n in ((0, 41), (0.8, 30)))
    for a, b in ((x, y), (y, x)):
        got = evaluate.inside(a, b, evaluate.radii(b, block=7), block=11)
        assert got == pytest.approx(naive_precision(a.numpy(), b.numpy())) and 0.1 < got < 0.9


def test_five_numbers_are_those_of_the_formulas(tiny, tmp_path, monkeypatch):
    import scipy.linalg
    monkeypatch.setattr(evaluate, "SPLIT", 25)
    a, b = pictures(60), pictures(50, 1) // 2 + 60
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez(tmp_path / "b.npz", arr_0=b)
    got = score("--samples", tmp_path / "a.npz", "--ref", tmp_path / "b.npz", "--batch-size", 7)
    (x, xs, logits), (y, ys, _) = features(a), features(b)
    for name, p, q in (("fid", x, y), ("sfid", xs, ys)):
        s, t = np.cov(p, rowvar=False), np.cov(q, rowvar=False)
        wanted = ((p.mean(0) - q.mean(0)) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
        assert got[name] == pytest.approx(wanted, rel=1e-6)
    assert got["is"] == pytest.approx(naive_inception_score(logits, 25), rel=1e-6)
    assert (got["precision"], got["recall"]) == pytest.approx((naive_precision(x, y), naive_precision(y, x)))
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


# Where images come from

def test_an_npz_a_folder_and_a_prepared_dataset_of_the_same_images_are_the_same(tiny, tmp_path, monkeypatch):
    images, ref = pictures(30, shape=(8, 8, 3)), tmp_path / "ref.npz"
    np.savez(ref, arr_0=pictures(40, 1))
    np.savez(tmp_path / "stored.npz", arr_0=images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images, labels=np.arange(30))
    write_pngs(tmp_path / "tree" / "class", images)
    haste.main(preparing(tmp_path / "tree", tmp_path / "data"))
    real, asked = evaluate.zipfile.ZipExtFile.read, []
    monkeypatch.setattr(evaluate.zipfile.ZipExtFile, "read",
                        lambda self, n=-1: (asked.append(n), real(self, n))[1])
    found = [score("--samples", tmp_path / name, "--ref", ref, "--batch-size", 8)
             for name in ("stored.npz", "packed.npz", "tree", "data")]
    assert found[1:] == found[:1] * 3
    assert 0 < max(asked) <= 8 * 192 and min(asked) >= 0        # a batch, or numpy's header, never the whole
    for name in ("stored.npz", "tree"):
        more = "--batch-size", 8, "--num-workers", 2
        assert found[0] == score("--samples", tmp_path / name, "--ref", ref, *more)
    for name in ("stored.npz", "packed.npz", "tree", "data"):
        batch = evaluate.open_images(tmp_path / name)[range(27, 30)]
        assert torch.equal(batch, torch.from_numpy(images[27:]).permute(0, 3, 1, 2))


def test_a_folder_may_hold_every_kind_of_image(tiny, tmp_path):
    grey, folder = np.linspace(0, 65535, 15).astype(np.uint16).reshape(5, 3), tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    Image.fromarray(grey).save(folder / "1.png")
    Image.fromarray(np.full((5, 3), 77, np.uint8)).save(folder / "2.PNG")
    Image.fromarray(np.full((5, 3, 4), (10, 20, 30, 0), np.uint8)).save(folder / "3.png")
    Image.fromarray(np.full((5, 3, 3), 200, np.uint8)).quantize(2).save(tmp_path / "4.png")
    images = evaluate.open_images(tmp_path)
    assert len(images) == 4 and images.shape == (4, 5, 3, 3)
    by_name = dict(zip((p.name for p in images.files.paths), images[range(4)].float()))
    assert (by_name["1.png"] == torch.from_numpy(grey // 257)).all()        # not clipped to white
    assert (by_name["2.PNG"] == 77).all() and (by_name["4.png"] == 200).all()
    assert by_name["3.png"][:, 0, 0].tolist() == [10, 20, 30]
    for name in ("1", "2"):
        write_pngs(tmp_path / "dots" / name, pictures(5, shape=(1, 1, 3)))
    assert score("--samples", tmp_path / "dots" / "1", "--ref", tmp_path / "dots" / "2")["fid"] < 1e-9


def test_a_reference_that_make_ref_wrote_gives_the_same_numbers(tiny, tmp_path, monkeypatch, capsys):
    write_pngs(tmp_path / "real", pictures(30))
    np.savez(tmp_path / "samples.npz", arr_0=pictures(35, 1))
    samples, ref = ["--samples", tmp_path / "samples.npz"], tmp_path / "sub" / "ref.npz"
    score("--make-ref", tmp_path / "real", "--out", ref)
    wanted, made = score(*samples, "--ref", tmp_path / "real"), dict(np.load(ref))
    assert score(*samples, "--ref", ref) == pytest.approx(wanted, rel=1e-9)
    assert {k: (x.dtype.name, x.shape) for k, x in made.items()} == {
        "arr_0": ("uint8", (30, 8, 8, 3)), "mu": ("float64", (24,)), "sigma": ("float64", (24, 24)),
        "mu_s": ("float64", (20,)), "sigma_s": ("float64", (20, 20))}
    assert np.array_equal(made.pop("arr_0"), pictures(30))
    np.savez(tmp_path / "alone.npz", **made)
    capsys.readouterr()
    alone = score(*samples, "--ref", tmp_path / "alone.npz")
    assert alone == pytest.approx({k: wanted[k] for k in ("fid", "sfid", "is")}, rel=1e-9)
    assert "left out: " in (out := capsys.readouterr().out) and "holds statistics but no images" in out
    monkeypatch.setattr(evaluate, "OF_REF", 4)          # of many images a few, from all over
    score("--make-ref", tmp_path / "real", "--out", ref)
    assert np.array_equal(np.load(ref)["arr_0"], pictures(30)[[0, 10, 19, 29]])
    assert score(*samples, "--ref", ref)["fid"] == pytest.approx(wanted["fid"], rel=1e-9)


def test_a_sample_files_own_statistics_go_before_its_images_as_in_adm(tiny, tmp_path):
    np.savez(tmp_path / "other.npz", arr_0=pictures(50, 5))
    score("--make-ref", tmp_path / "other.npz", "--out", tmp_path / "ref.npz")
    np.savez(tmp_path / "mixed.npz", **dict(np.load(tmp_path / "ref.npz")) | {"arr_0": pictures(40, 6)})
    np.savez(tmp_path / "plain.npz", arr_0=pictures(40, 6))
    mixed, plain = (score("--samples", tmp_path / f"{name}.npz", "--ref", tmp_path / "ref.npz", "--json",
                          tmp_path / "j.json") for name in ("mixed", "plain"))
    assert abs(mixed["fid"]) < 1e-6 < plain["fid"] and mixed["is"] == plain["is"]
    assert mixed["precision"] == plain["precision"]


# Samples of a checkpoint

@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A folder with a run's checkpoint at step 2, 8 x 8 pixels, 4 classes; and one without label dropout."""
    out = tmp_path_factory.mktemp("runs")
    haste.main(flags(world, out, max_train_steps=2))
    haste.main(flags(world, out, exp_name="no_null", max_train_steps=2, cfg_prob=0))
    np.savez(out / "ref.npz", arr_0=pictures(30))
    return out


def drawing(runs, out, **more):
    """20 samples in 5 batches of a copy of the checkpoint, below out, in words of the command line."""
    path = out / "run" / "checkpoints" / "0000002.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True)
        path.write_bytes((runs / "run" / "checkpoints" / "0000002.pt").read_bytes())
    given = dict(ckpt=path, ref=runs / "ref.npz", num_samples=20, batch_size=4, num_steps=3,
                 json=out / "out.json")
    return words(**given | more)


def test_the_protocol_is_told_whole_in_print_and_in_json(tiny, runs, tmp_path, capsys):
    guided = dict(mode="heun", cfg_scale=1.5, guidance_high=0.7)
    results = score(*drawing(runs, tmp_path, inception="random", **guided))
    lines = capsys.readouterr().out.splitlines()
    told, = (tmp_path / "run" / "eval").iterdir()
    report = json.loads((tmp_path / "out.json").read_text())
    assert told.suffix == ".json" and json.loads(told.read_text()) == report
    assert {k: report[k] for k in results} == results
    assert list(results) == ["fid", "sfid", "is", "precision", "recall"]
    assert np.isfinite(list(results.values())).all()
    wanted = {"sampler": "heun", "evaluations": 5, "guidance": 1.5, "interval": [0.0, 0.7], "seed": 0,
              "number of samples": 20, "labels": "uniform at random", "precision": "fp32", "weights": "EMA",
              "VAE": "none: pixels", "size": "8 x 8", "features": "random",
              "reference": str(runs / "ref.npz")}
    assert {k: report["protocol"].get(k) for k in wanted} == wanted
    for name, value in report["protocol"].items():
        assert any(line.startswith(name) and str(value) in line for line in lines)
    assert all(line.count("comparable only with itself") == 1 for line in lines)
    assert sum(line.startswith("warning") and "20 samples" in line for line in lines) == 1


def test_the_samples_that_are_kept_are_those_that_were_measured(tiny, runs, tmp_path):
    drawn = score(*drawing(runs, tmp_path, save_npz=tmp_path / "new" / "s.npz"))
    kept = np.load(tmp_path / "new" / "s.npz")
    arr_0 = kept["arr_0"]
    assert kept.files == ["arr_0"] and arr_0.shape == (20, 8, 8, 3) and arr_0.dtype == np.uint8
    ready = score("--samples", tmp_path / "new" / "s.npz", "--ref", runs / "ref.npz", "--batch-size", 4)
    assert ready == drawn and [p.name for p in (tmp_path / "new").iterdir()] == ["s.npz"]
    assert [p.suffix for p in (tmp_path / "run" / "eval").iterdir()] == [".json"]       # no state is left
    model, _ = haste.load_model(tmp_path / "run" / "checkpoints" / "0000002.pt", None)
    args = evaluate.parse(drawing(runs, tmp_path))
    args.precision = "fp32"
    samples = evaluate.Generated(args, torch.device("cpu"))
    assert same(samples.model.state_dict(), model.state_dict())     # the EMA's
    assert torch.equal(samples[range(8, 12)], torch.from_numpy(arr_0[8:12]).permute(0, 3, 1, 2))
    assert not torch.equal(samples[range(8, 12)], samples[range(12, 16)])


class Killed(BaseException):
    pass


def count_batches(monkeypatch, stop=None):
    """The list that will hold the first row of each batch drawn; after `stop` of them the run is killed."""
    real, drawn = evaluate.Generated.__getitem__, []

    def drawing(self, rows):
        if len(drawn) == stop:
            raise Killed
        drawn.append(rows.start)
        return real(self, rows)
    monkeypatch.setattr(evaluate.Generated, "__getitem__", drawing)
    return drawn


@pytest.mark.parametrize("kept", [False, True])
def test_a_killed_run_goes_on_and_ends_as_one_never_killed(tiny, runs, tmp_path, monkeypatch, capsys, kept):
    more = lambda out: {"save_every": 0} | ({"save_npz": out / "s.npz"} if kept else {})
    whole = score(*drawing(runs, tmp_path / "whole", **more(tmp_path / "whole")))
    argv = drawing(runs, tmp_path, **more(tmp_path))
    with monkeypatch.context() as patch:
        count_batches(patch, stop=3)
        with pytest.raises(Killed):
            score(*argv)
    state, = (tmp_path / "run" / "eval").glob("*.state")
    saved = state.read_bytes()
    monkeypatch.chdir(tmp_path)         # what lies there says nothing about the run
    others = ["--seed=1", "--num-steps=4", "--cfg-scale=2", "--guidance-high=.5", "--mode=ode", "--balanced",
              "--precision=bf16", "--no-prec-recall", f"--inception={runs / 'ref.npz'}"]
    for changed in others[:1] if kept else others:
        with monkeypatch.context() as patch:
            drawn = count_batches(patch)
            score(*argv, changed)
        assert drawn == [0, 4, 8, 12, 16] and state.read_bytes() == saved, changed
    drawn = count_batches(monkeypatch)
    capsys.readouterr()
    assert score(*argv) == whole and drawn == [12, 16] and not state.exists()
    assert "resuming after 12 of 20 samples" in capsys.readouterr().out
    if kept:
        a, b = (np.load(folder / "s.npz")["arr_0"] for folder in (tmp_path, tmp_path / "whole"))
        assert np.array_equal(a, b)
    drawn.clear()
    assert score(*argv) == whole and drawn == [0, 4, 8, 12, 16]     # what is finished is no start


@pytest.mark.parametrize("harm", ["torn", "another checkpoint", "no samples"])
def test_progress_that_cannot_be_used_is_not(tiny, runs, tmp_path, monkeypatch, capsys, harm):
    argv = drawing(runs, tmp_path, save_every=0, save_npz=tmp_path / "s.npz")
    with monkeypatch.context() as patch:
        count_batches(patch, stop=3)
        with pytest.raises(Killed):
            score(*argv)
    if harm == "torn":
        state, = (tmp_path / "run" / "eval").glob("*.state")
        state.write_bytes(state.read_bytes()[:1000])
    elif harm == "no samples":
        for raw in tmp_path.glob("s.npz.*"):
            raw.unlink()
    else:
        path = tmp_path / "run" / "checkpoints" / "0000002.pt"
        os.utime(path, (1, 1))
    drawn = count_batches(monkeypatch)
    capsys.readouterr()
    score(*argv)
    assert drawn == [0, 4, 8, 12, 16]
    assert ("starting anew" in capsys.readouterr().out) == (harm == "torn")


def test_two_processes_draw_and_measure_what_one_does(tiny, runs, tmp_path):
    one = score(*drawing(runs, tmp_path / "one", save_npz=tmp_path / "one.npz", num_samples=42))
    script = tmp_path / "tiny_evaluate.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(HASTE).parent)!r})\n"
                      "import evaluate, test_haste\n"
                      "vars(evaluate).update(test_haste.SMALL, Inception=test_haste.TinyInception)\n"
                      "evaluate.main()\n")
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    argv = drawing(runs, tmp_path / "two", save_npz=tmp_path / "two.npz", num_samples=42)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, script, *argv], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fid  ") == 2 and done.stdout.count("recall  ") == 1       # told once
    two = json.loads((tmp_path / "two" / "out.json").read_text())
    assert {k: two[k] for k in one} == pytest.approx(one, rel=1e-9)
    assert np.array_equal(np.load(tmp_path / "two.npz")["arr_0"], np.load(tmp_path / "one.npz")["arr_0"])


def test_labels_are_drawn_at_random_or_are_as_many_of_each_class_in_random_order(runs, tmp_path):
    def labels(*more):
        args = evaluate.parse([*drawing(runs, tmp_path, num_samples=4000), *more])
        return evaluate.Generated(args, torch.device("cpu")).labels.numpy()
    balanced, drawn = labels("--balanced"), labels()
    assert np.bincount(balanced).tolist() == [1000] * 4
    counts = np.bincount(drawn, minlength=4)
    assert counts.tolist() != [1000] * 4 and np.abs(counts - 1000).max() < 5 * math.sqrt(4000 * 3 / 16)
    for y in (balanced, drawn):     # no class follows another more often than by chance
        follows = np.bincount(4 * y[:-1] + y[1:], minlength=16)
        assert np.abs(follows - 250).max() < 5 * math.sqrt(4000 * 15 / 256)
    assert same(labels().tolist(), drawn.tolist()) and labels("--seed", "1").tolist() != drawn.tolist()


def test_the_noise_of_the_sde_is_not_the_noise_that_it_starts_from(runs, tmp_path, monkeypatch):
    samples = evaluate.Generated(evaluate.parse(drawing(runs, tmp_path)), torch.device("cpu"))
    seeds, real = [], haste.seeded_noise
    monkeypatch.setattr(haste, "seeded_noise",
                        lambda model, n, seed, device: (seeds.append(seed), real(model, n, seed, device))[1])
    for rows in (range(0, 4), range(4, 8)):
        samples[rows]
        seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 4


def test_latents_are_decoded_by_the_vae_and_the_protocol_names_it(tiny, world, latents, runs, tmp_path):
    haste.main(flags(world, tmp_path, data_dir=latents, max_train_steps=2))
    for more, name in (({}, "stub"), ({"vae": "another"}, "another")):
        score(*drawing(runs, tmp_path, **more))
        protocol = json.loads((tmp_path / "out.json").read_text())["protocol"]
        assert (protocol["VAE"], protocol["size"]) == (name, "64 x 64")


def test_what_makes_a_fid_incomparable_is_said(tiny, runs, tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "wide.npz", arr_0=pictures(20, shape=(8, 12, 3)))
    score("--samples", tmp_path / "wide.npz", "--ref", runs / "ref.npz")
    out = capsys.readouterr().out
    assert "samples are 12 x 8, reference images 8 x 8" in out
    assert "no more than the 24 features" in out and "FID is biased upwards" in out
    monkeypatch.setattr(evaluate, "NEIGHBOURS", 20)
    assert "precision" not in score("--samples", tmp_path / "wide.npz", "--ref", runs / "ref.npz")
    assert "left out: they take more than 20 images on either side" in capsys.readouterr().out
    few, enough = (list(evaluate.warnings(range(n), None, None)) for n in (5000, 50_000))
    assert len(few) == 1 and "would have 9.75 with 5,000" in few[0] and "features" not in few[0]
    assert not enough
    assert not list(evaluate.warnings(range(5000), {"pool": "of a whole training set"}, None))


def test_samples_that_are_sorted_or_compressed_are_told_so(world, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "SPLIT", 10)
    (tmp_path / "flat").mkdir()
    for i in range(12):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "flat" / f"{i}.jpg")
    told = {name: " ".join(evaluate.warnings(evaluate.open_images(path), "own", None)) for name, path in (
        ("classes", world / "images"), ("prepared", world / "data"), ("flat", tmp_path / "flat"))}
    assert "folder by folder" in told["classes"] and "folder by folder" in told["prepared"]
    assert "JPEG" in told["flat"] and "folder" not in told["flat"] and "JPEG" not in told["classes"]


# Mistakes

@pytest.fixture(scope="module")
def mess(runs, tmp_path_factory):
    """A folder of good.npz, and of everything that a user might pass in its place."""
    home, save = tmp_path_factory.mktemp("mess"), np.savez
    images, n, d, eye = pictures(6), 2048, 2023, np.eye
    statistics = {"mu": np.zeros(n), "sigma": eye(n), "mu_s": np.zeros(d), "sigma_s": eye(d)}
    save(home / "good.npz", arr_0=images)
    save(home / "float.npz", arr_0=images / 255)
    save(home / "nchw.npz", arr_0=images.transpose(0, 3, 1, 2))
    save(home / "fortran.npz", arr_0=np.asfortranarray(images))
    save(home / "grey.npz", arr_0=images[..., 0])
    save(home / "object.npz", arr_0=np.array([{}, None]))
    save(home / "one.npz", arr_0=images[:1])
    save(home / "keyless.npz", samples=images)
    save(home / "statistics.npz", **statistics)
    save(home / "pytorch_fid.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    save(home / "nan.npz", **statistics | {"mu_s": np.full(d, np.nan)})
    save(home / "swapped.npz", **statistics | {"sigma_s": eye(n)})
    save(home / "pickled.npz", **statistics | {"mu": np.array([{}])})
    whole = (home / "good.npz").read_bytes()
    (home / "cut.npz").write_bytes(whole[:-200])
    (home / "damaged.npz").write_bytes(whole[:600] + bytes([whole[600] ^ 255]) + whole[601:])
    with evaluate.zipfile.ZipFile(home / "short.npz", "w") as file:
        file.writestr("arr_0.npy", evaluate.zipfile.ZipFile(home / "good.npz").read("arr_0.npy")[:-9])
    (home / "text.npz").write_text("no archive")
    (home / "empty").mkdir()
    write_pngs(home / "mixed", [*images, *pictures(1, shape=(9, 8, 3))])
    write_pngs(home / "single", images[:1])
    write_pngs(home / "torn", images)
    (home / "torn" / "0003.png").write_bytes((home / "torn" / "0003.png").read_bytes()[:99])
    torch.save(tiny_vit().state_dict(), home / "vit.pth")
    (home / "cut.pth").write_bytes((home / "vit.pth").read_bytes()[:5000])
    for name in ("run", "no_null"):
        (home / f"{name}.pt").write_bytes((runs / name / "checkpoints" / "0000002.pt").read_bytes())
    return home


@pytest.mark.parametrize("path, sentence", {
    "nothing.npz": "there is no file or folder", "float.npz": "float64", "nchw.npz": "it is NCHW",
    "fortran.npz": "Fortran", "grey.npz": "(6, 8, 8)", "object.npz": "arr_0 is object",
    "one.npz": "at least two", "keyless.npz": "holds samples, but no images", "cut.npz": "no whole .npz",
    "short.npz": "cut short", "text.npz": "no whole .npz", "damaged.npz": "Bad CRC", "empty": "has no images",
    "mixed": "0006.png is 8 x 9", "single": "at least two images", "torn": "0003.png cannot be read"}.items())
def test_a_mistake_in_samples_or_in_a_reference(tiny, mess, capsys, monkeypatch, path, sentence):
    drawn = count_batches(monkeypatch)
    for argv in (["--samples", mess / path, "--ref", mess / "good.npz"],
                 ["--samples", mess / path, "--ref", mess / "good.npz", "--num-workers", 1],
                 ["--make-ref", mess / path, "--out", mess / "ref.npz"],
                 ["--ckpt", mess / "run.pt", "--ref", mess / path, "--num-samples", 20]):
        assert sentence in refusal(capsys, *argv)
    assert not drawn and not (mess / "ref.npz").exists()        # told before any sample was drawn


@pytest.mark.parametrize("argv, sentence", [
    ("--samples statistics.npz --ref good.npz", "no images under arr_0"),
    ("--samples good.npz --ref pytorch_fid.npz", "pytorch-fid and clean-fid"),
    ("--ckpt run.pt --ref good.npz --guidance-low .7 --guidance-high .3", "there would be no guidance"),
    ("--samples good.npz --ref nan.npz", "is not finite"),
    ("--samples good.npz --ref swapped.npz", "(2023, 2023)"),
    ("--samples good.npz --ref pickled.npz", "cannot be read"), ("--samples good.npz", "--ref is missing"),
    ("--samples good.npz --ref good.npz --json good.npz/out.json", "cannot be written"),
    ("--samples good.npz --ref good.npz --json empty", "cannot be written"),
    ("--make-ref good.npz --out good.npz/ref.npz", "cannot be written"),
    ("--ckpt run.pt --ref good.npz --save-npz good.npz/s.npz", "cannot be written"),
    ("--samples good.npz --ref good.npz --inception vit.pth", "could not be loaded as the FID Inception's"),
    ("--samples good.npz --ref good.npz --inception cut.pth", "could not be loaded as the FID Inception's"),
    ("--samples good.npz --ref good.npz --inception no.pth", "could not be loaded as the FID Inception's"),
    ("--ckpt no.pt --ref good.npz", "no.pt cannot be read"),
    ("--ckpt run.pt --ref no.npz", "no file or folder"), ("--ckpt good.npz --ref good.npz", "cannot be read"),
    ("--ckpt vit.pth --ref good.npz", "holds no weights"),
    ("--ckpt no_null.pt --ref good.npz --cfg-scale 1.5", "without label dropout"),
    ("--ckpt run.pt --ref good.npz --num-samples 1", "at least 2"), ("--ref good.npz", "--ckpt"),
    ("--ckpt run.pt --ref good.npz --cfg-scale nan", "--cfg-scale"),
    ("--ckpt vit.pth --ref good.npz --model SiT-H/2", "unknown model"),
    ("--samples good.npz --ref good.npz --num-steps 50", "--num-steps says nothing about --samples"),
    ("--samples good.npz --ref good.npz --save-npz s.npz", "--save-npz says nothing about --samples"),
    ("--make-ref good.npz --ref good.npz", "--ref says nothing about --make-ref"),
    ("--ckpt run.pt --ref good.npz --out o.npz", "--out says nothing about --ckpt"),
])
def test_a_mistake_in_the_flags_of_evaluate(mess, capsys, monkeypatch, argv, sentence):
    monkeypatch.chdir(mess)
    drawn, before = count_batches(monkeypatch), {p.name for p in mess.iterdir()} | {"eval"}
    assert sentence in refusal(capsys, *argv.split())
    assert not drawn and {p.name for p in mess.iterdir()} <= before


def test_a_disk_too_small_for_the_samples_is_said_at_once(tiny, mess, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=7e8))
    keep = "--save-npz", tmp_path / "s.npz", "--num-samples", 2_000_000
    said = refusal(capsys, "--ckpt", mess / "run.pt", "--ref", mess / "good.npz", *keep)
    assert "0.8 GB" in said and "0.7 GB are free" in said and not list(tmp_path.iterdir())


# ---- 13. evaluate.py: the demo, haste.py --demo ------------------------------------------------------------

@pytest.mark.parametrize("kind", ["SiT", "DiT", "MMDiT"])
def test_the_demo_is_a_row_of_ordinary_commands(tiny, tmp_path, monkeypatch, capsys, kind):
    real, draw, render = evaluate.fit, haste.sample, evaluate.render_glyphs
    monkeypatch.setattr(evaluate, "fit",
                        lambda net, loss, inputs, steps, title: real(net, loss, inputs, 2, title))
    monkeypatch.setattr(haste, "sample", lambda *a, **kw: draw(*a, **kw | {"steps": 2}) if "steps" in kw
                        else draw(*a[:3], 2, *a[4:], **kw))
    monkeypatch.setattr(evaluate, "render_glyphs", lambda n, seed: render(min(n, 200), seed))
    name, which = ("demo", []) if kind == "SiT" else (f"demo-{kind}", ["--model", kind])
    haste.main(["--demo", *which, "--output-dir", str(tmp_path), "--tau", "1", "--max-train-steps", "2"])
    out, home = capsys.readouterr().out.splitlines(), tmp_path / name
    commands = [shlex.split(line)[2:] for line in out if line.startswith("$ python ")]
    again = [["haste.py", "--prepare"]] * (kind == "MMDiT")      # the held-back letters' captions
    assert [c[:2] for c in commands] == [["haste.py", "--prepare"], ["haste.py", "--model"],
                                          ["haste.py", "--sample"], *again, ["evaluate.py", "--ckpt"]]
    assert commands[1][2] == f"{kind}-XS/4"
    assert (home / "demo.png").is_file() and sum("the judge reads" in line for line in out) == 3
    assert [m["phase"] for m in metrics(tmp_path, name)] == [1, 2]
    told = json.loads((home / "metrics.json").read_text())
    assert {"fid", "sfid", "is", "precision", "recall"} < told.keys()
    for script, *command in commands:       # they work by themselves, too
        results = (haste if script == "haste.py" else evaluate).main(command)
    assert results == {k: told[k] for k in results}


def test_glyphs_are_letters_in_place():
    images, labels, masks = evaluate.render_glyphs(50, seed=5)
    assert images.shape == (50, 3, 24, 24) and images.dtype == torch.uint8 and masks.shape == (50, 24, 24)
    assert set(labels.tolist()) <= set(range(10))
    assert same(evaluate.render_glyphs(50, seed=5), (images, labels, masks))
    ink = (images.float().mean(1) * (masks > 0.9)).sum((1, 2)) / (masks > 0.9).sum((1, 2))
    paper = (images.float().mean(1) * (masks < 0.1)).sum((1, 2)) / (masks < 0.1).sum((1, 2))
    assert (ink > paper + 20).all() and (0.05 < masks.mean((1, 2))).all() and (masks.mean((1, 2)) < 0.5).all()


# ---- 14. evaluate.py: the comparison, haste.py --demo --compare --------------------------------------------

def test_initial_weights_are_a_function_of_the_seed_whatever_the_teachers_width():
    for make in (tiny_sit, tiny_dit):
        a, b = (make(**sizes).state_dict() for sizes in ({}, {"teacher_dim": 40, "projector_dim": 8}))
        assert a.keys() == b.keys()
        assert all(same(a[k], b[k]) for k in a if not k.startswith("projectors."))


@pytest.fixture
def contest(world, tmp_path, monkeypatch):
    """contest(*flags): the comparison on the world's squares, 10 steps a run, in this process. Its folder."""
    fit = evaluate.fit
    monkeypatch.setattr(evaluate, "fit",
                        lambda net, loss, inputs, steps, title: fit(net, loss, inputs, 3, title))

    def contend_here(jobs, *_):
        for job in jobs:
            evaluate.contend(*job)

    monkeypatch.setattr(evaluate, "run_all", contend_here)

    def run(*flags):
        haste.main(["--demo", "--compare", "--data-dir", f"{world}/data", "--model", "SiT-XS/2",
                    "--output-dir", str(tmp_path), "--max-train-steps", "10", "--tau", "4", "--tau-from", "2",
                    "--tau-every", "2", "--tau-images", "6", "--batch-size", "8", "--log-every", "1", *flags])
        return tmp_path / "compare"
    return run


def test_the_comparison_starts_all_alike_and_differs_in_the_alignment_alone(contest, tmp_path, capsys):
    home = contest("--seed", "3")
    first = json.loads((home / "compare.json").read_text())

    def lines(name):
        return [line for line in metrics(tmp_path, f"compare/seed3/{name}") if "loss" in line]

    names = list(first["runs"])
    assert names == ["plain", "REPA", "attention", "never", "HASTE", "auto"]
    weights = {name: [checkpoint(tmp_path, s, f"compare/seed3/{name}")["ema"] for s in (2, 4, 6)]
               for name in names}
    # the same weights, batch and noise
    assert len({lines(name)[0]["loss_diff"] for name in names}) == 1
    assert same(weights["never"][:2], weights["HASTE"][:2])
    assert not same(weights["never"][2], weights["HASTE"][2])
    assert len({lines(name)[4]["loss_diff"] for name in names[:4]}) == 4    # four ways to align
    assert [line["phase"] for line in lines("HASTE")] == [1] * 4 + [2] * 6
    assert {x["phase"] for x in lines("plain")} == {2}
    assert [a["step"] for a in first["angles"]["3"]] == [2, 4, 6, 8]        # "never" goes on measuring
    fired = [a["step"] for a in first["angles"]["3"] if a["cosine"] < -0.05]
    assert first["auto_stopped_at"]["3"] == (fired[0] if fired else None)

    # the floor: held-back images against held-back images
    saved = haste.load_file(home / "judge.pt")
    judge = evaluate.Judge(4).eval()
    judge.load_state_dict(saved["model"])
    (_, _, rest), _ = evaluate.three_parts(first["protocol"]["data"])
    with torch.no_grad():
        a, b = ((x.mean(0).numpy(), x.T.cov().numpy())
                for x in (judge(half)[0].double() for half in rest[0].split(5)))
    assert first["floor"] == pytest.approx(evaluate.frechet_distance(*a, *b), rel=1e-6)
    assert same(saved["labels"], rest[1][:5])

    # with another seed it does only what is new; with other flags, it is refused
    before = {p: p.stat().st_mtime_ns for p in home.rglob("*.pt")}
    capsys.readouterr()
    contest("--seeds", "2", "--seed", "3")
    out, told = capsys.readouterr().out, json.loads((home / "compare.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert all(list(of) == ["3", "4"] and list(of["4"]) == ["2", "4", "6", "8", "10"]
               for of in told["runs"].values())
    assert {name: {"3": of["3"]} for name, of in told["runs"].items()} == first["runs"]
    table = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ")]
    two = [told["runs"]["plain"][seed]["2"]["distance"] for seed in "34"]
    assert len(table) == 7 and table[2][1].split(",")[0].split() == [
        f"{np.mean(two):.2f}", "±", f"{np.std(two, ddof=1):.2f}"]
    with pytest.raises(SystemExit) as stop:
        contest("--learning-rate", "0.1")
    assert stop.value.code == 2 and "other flags" in capsys.readouterr().err


def test_what_is_held_back_is_not_trained_on(world, monkeypatch):
    render = evaluate.render_glyphs     # as many for each part: with the same seed they would be the same
    monkeypatch.setattr(evaluate, "render_glyphs", lambda n, seed: render(100, seed))
    for where, count in ((None, 100), (world / "data", 10)):
        parts, classes = evaluate.three_parts(where)
        train, judges, rest = ({image.numpy().tobytes() for image in images} for images, *_ in parts)
        assert not (train | judges) & rest and len(rest) == count
        assert where or not train & judges      # of letters the judge has its own
        assert parts[0][0].dtype == torch.uint8
        assert {y for _, labels, _ in parts for y in labels.tolist()} <= set(range(len(classes)))


def test_a_run_of_the_comparison_that_fails_is_named_with_its_log(tmp_path):
    jobs = [(tmp_path / name, ["--data-dir", f"{tmp_path}/none"], tmp_path / "judge.pt") for name in "ab"]
    with pytest.raises(haste.Failure, match=r"exit code 2, .*/log.txt says why"):
        evaluate.run_all(jobs, 10, False, [])
    told = [(tmp_path / run / "log.txt").read_text() for run in "ab"]
    assert any("is empty or missing" in text for text in told)
    # asked to stop, it starts none
    assert evaluate.run_all(jobs, 10, False, [signal.SIGTERM]) == haste.AGAIN


def test_mistakes_in_a_comparison(world, tmp_path, capsys):
    compare, out = ["--demo", "--compare"], ["--output-dir", tmp_path / "o"]
    for argv, why in (
            (["--compare"], "goes with --demo"), (["--demo", "--seeds", 2], "leave them out"),
            ([*compare, "--model", "MMDiT", *out], "choose a SiT or a DiT"),
            ([*compare, "--keep=3", *out], "leave --keep and"),
            ([*compare, "--max-train-steps", 7, *out], "does not divide by 5"),
            ([*compare, "--data-dir", tmp_path, *out], "holds no dataset|is empty")):
        assert re.search(why, complaint(capsys, argv))
    assert not (tmp_path / "o").exists()
