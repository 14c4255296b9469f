# SPDX-License-Identifier: MIT
"""What haste.py and evaluate.py promise, in the order of the files. Run: python -m pytest -q"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import evaluate
import haste
from haste import UserError

torch.set_num_threads(1)  # faster at these sizes
HASTE = str(Path(haste.__file__).resolve())
TINY = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 5,
    "attention_blocks": (1, 2),
    "feature_block": 3,
    "teacher_dim": 24,
    "projector_dim": 16,
}


# ---- Helpers: a tiny world ---------------------------------------------------------------------------------


def tiny_model(kind=haste.SiT, **sizes):
    torch.manual_seed(0)
    return kind(**TINY | sizes)


def awake(model):
    """The model with random weights where it starts at zero."""
    for p in model.parameters():
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.1)
    return model


def tiny_vit(**config):
    torch.manual_seed(0)
    return VisionTransformer(
        **{
            "img_size": 8,
            "patch_size": 2,
            "embed_dim": 24,
            "depth": 12,
            "num_heads": 2,
            "num_classes": 0,
            "dynamic_img_size": True,
        }
        | config
    )


def frozen(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def with_frozen_weights(model, without="nothing"):
    """The model with weights of numpy's streams."""
    state = model.state_dict()
    for i, name in enumerate(sorted(n for n in state if not n.startswith(without))):
        if name != "pos_embed":
            width = state[name][0].numel() if state[name].ndim > 1 else 2500
            state[name] = frozen(1000 + i, *state[name].shape) * width**-0.5
    model.load_state_dict(state)
    return model


def frozen_noise(monkeypatch):
    """torch.randn_like draws from numpy's streams, too."""
    drawn = iter(range(501, 600))
    monkeypatch.setattr(torch, "randn_like", lambda a: frozen(next(drawn), *a.shape).to(a.dtype))


def parse(line, *more):
    return haste.parse("haste.py", haste.FLAGS, [*line.split(), *map(str, more)])


def save_images(folder, n=40, classes=4, size=(9, 12), seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        path = folder / f"class{i % classes}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)


def prepare(source, out, *more):
    haste.prepare(
        parse(f"--prepare {source} --data-dir {out} --resolution 8 --vae none --num-workers 0", *more)
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """40 small images in 4 classes, prepared as pixels of 8 x 8, and a teacher of 12 blocks."""
    home = tmp_path_factory.mktemp("world")
    save_images(home / "images")
    prepare(home / "images", home / "data")
    config = dict(img_size=8, patch_size=2, embed_dim=24, depth=12, num_heads=2, num_classes=0)
    torch.save({"config": config, "model": tiny_vit().state_dict()}, home / "teacher.pt")
    return home


def flags(world, out, *more, model="SiT-XS/2", data="data"):
    """A run of 6 steps, 3 in each phase."""
    return parse(
        f"--model {model} --data-dir {world / data} --teacher {world / 'teacher.pt'} --output-dir {out} "
        "--exp-name run --batch-size 8 --max-train-steps 6 --tau 3 --checkpointing-steps 2 --log-every 1 "
        "--sampling-steps 0 --num-workers 0 --learning-rate 1e-3 --num-steps 2",
        *more,
    )


def train(world, out, *more, **kind):
    return haste.train(flags(world, out, *more, **kind))


def checkpoint(out, step):
    return haste.read_checkpoint(Path(out, "run/checkpoints", f"{step:07d}.pt"), "SiT-XS/2")


def metrics(out):
    return [json.loads(line) for line in Path(out, "run/metrics.jsonl").read_text().splitlines()]


def same(a, b):
    """True if two nests of dictionaries, lists and tensors agree to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "args")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def complaint(*argv):
    """The sentence that the command line ends with."""
    with pytest.raises(SystemExit) as stop:
        haste.main(list(map(str, argv)))
    assert str(stop.value).startswith("haste.py: ") and "\n" not in str(stop.value)
    return str(stop.value)


# ---- 1. The student ----------------------------------------------------------------------------------------


def test_released_code_gives_the_same_figures(monkeypatch):
    """Forward, losses, gradients and samplers of the authors' code, run on numpy's frozen streams."""
    model = haste.SiT(hidden_size=192, depth=10, num_classes=10, teacher_dim=48, projector_dim=96)
    with_frozen_weights(model)
    x, eps, t, y = (
        frozen(1, 2, 4, 32, 32),
        frozen(2, 2, 4, 32, 32),
        torch.tensor([0.3, 0.8]),
        torch.tensor([3, 7]),
    )
    maps = [(frozen(40 + i, 2, 12, 256, 64), frozen(60 + i, 2, 12, 256, 64)) for i in range(4)]
    losses = haste.losses(model, haste.Flow, x, eps, t, y, (frozen(3, 2, 256, 48), maps), 1, 1)
    assert [loss.item() for loss in losses] == pytest.approx(
        [3.124647, -0.002397, 5.951766], rel=2e-4, abs=2e-5
    )
    (losses[0] + 0.5 * losses[1] + 0.5 * losses[2]).backward()
    wanted = {
        "blocks.4.attn.qkv.weight": 0.640134,
        "blocks.7.attn.qkv.weight": 0.495325,
        "x_embedder.proj.weight": 0.376411,
        "projectors.0.0.weight": 0.047125,
        "final_layer.linear.weight": 2.75373,
    }
    named = dict(model.named_parameters())
    assert {name: named[name].grad.norm().item() for name in wanted} == pytest.approx(wanted, rel=2e-4)
    for mode, values, mean in (
        ("ode", [-0.570364, 2.528501, 2.473564, 0.119391], 1.093669),
        ("heun", [-0.494683, 2.502542, 2.412591, 0.107579], 1.086206),
        ("sde", [0.613797, 1.507382, 0.466727, 0.038904], 0.921484),
    ):
        frozen_noise(monkeypatch)
        out = haste.sample(model, frozen(9, 2, 4, 32, 32), y, 6, 1.8, (0.0, 0.7), mode)
        assert out[1, :, 20, 3].tolist() == pytest.approx(values, rel=2e-4, abs=2e-5), mode
        assert out.abs().mean().item() == pytest.approx(mean, rel=2e-4)


def test_parameters_are_those_of_sit_and_repa():
    with torch.device("meta"):
        model = haste.build_model("SiT-XL/2")
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("projectors"))
    assert count == 675_129_632 - 16 * (1152 + 1)  # SiT publishes its XL/2 with twice the output channels
    assert [n for n, _ in model.named_children()] == [
        "x_embedder",
        "t_embedder",
        "y_embedder",
        "blocks",
        "projectors",
        "final_layer",
    ]
    assert next(iter(model.named_parameters()))[0] == "pos_embed" and not model.pos_embed.requires_grad


def test_new_model_gives_zero_velocity_and_blocks_are_the_identity():
    model, x = tiny_model(), torch.randn(2, 3, 8, 8)
    assert not model(x, torch.rand(2), torch.tensor([0, 1])).any()
    tokens = torch.randn(2, 16, 32)
    assert torch.equal(model.blocks[0](tokens, torch.randn(2, 32))[0], tokens)


def test_initial_weights_do_not_depend_on_the_teachers_width():
    a, b = tiny_model(teacher_dim=24).state_dict(), tiny_model(teacher_dim=48).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a if not k.startswith("projectors"))


def test_unpatchify_puts_patches_back():
    image = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).float()
    tokens = image.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 12)
    assert torch.equal(haste.unpatchify(tokens, 2), image)


def test_align_returns_projected_tokens_and_the_maps_that_attention_used(monkeypatch):
    model, used, real = awake(tiny_model()), [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v: used.append((q, k)) or real(q, k, v)
    )
    tokens = []
    model.blocks[2].register_forward_hook(lambda m, args, out: tokens.append(out[0]))
    given = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 4])
    v, z, qk = model(*given, align=True)
    assert torch.equal(z, model.projectors[0](tokens[0])) and z.shape == (2, 16, 24)
    assert all(torch.equal(a, b) for pair, i in zip(qk, (1, 2)) for a, b in zip(pair, used[i]))
    assert torch.equal(v, model(*given))


def test_queries_and_keys_are_views():
    qkv = torch.randn(2, 5, 24)
    assert all(
        x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for x in haste.split_heads(qkv, 2)
    )


# ---- 2. The teacher ----------------------------------------------------------------------------------------


class Dino(VisionTransformer):
    """Speaks as the hub's DINOv2 does: no resampling, registers behind the class token, a dictionary."""

    def __init__(self, registers):
        torch.manual_seed(0)
        super().__init__(img_size=21, patch_size=3, embed_dim=24, depth=12, num_heads=2, num_classes=0)
        self.registers = nn.Parameter(torch.randn(1, registers, 24))
        self.patch_embed.strict_img_size = False

    def forward_features(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1) + self.pos_embed
        x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return {"x_norm_patchtokens": self.norm(x)[:, 1 + self.registers.shape[1] :]}


@pytest.mark.parametrize("kind", ["dinov2_vitb14", "dinov2_vitb14_reg", "file"])
def test_teacher_returns_features_and_maps_of_the_patches(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "load", lambda repo, name, **how: Dino(4 * name.endswith("reg")))
    config = dict(img_size=14, patch_size=2, embed_dim=24, depth=12, num_heads=2, num_classes=0)
    torch.save({"config": config, "model": VisionTransformer(**config).state_dict()}, tmp_path / "file")
    teacher = haste.load_teacher(str(tmp_path / kind) if kind == "file" else kind, 4, (7, 9, 11))
    inputs, last = [], []
    for b in (7, 9, 11):
        teacher.vit.blocks[b].attn.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    teacher.vit.norm.register_forward_hook(lambda m, args, out: last.append(out))
    features, qk = teacher(torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8))
    assert torch.equal(features, last[0][:, -16:]) and features.shape == (2, 16, teacher.dim)
    for b, x, (q, k) in zip((7, 9, 11), inputs, qk):
        q_all, k_all, _ = teacher.vit.blocks[b].attn.qkv(x).reshape(2, -1, 3, 2, 12).permute(2, 0, 3, 1, 4)
        cut = x.shape[1] - 16  # rows and columns of class and register tokens
        assert torch.allclose(q @ k.mT, (q_all @ k_all.mT)[:, :, cut:, cut:], atol=1e-5)
    assert not teacher.vit.training and not any(p.requires_grad for p in teacher.parameters())


def test_teacher_sees_the_image_normalised_and_bicubic_on_the_students_grid():
    teacher, seen = haste.Teacher(tiny_vit(img_size=12), (), 6), []
    teacher.vit.patch_embed.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    teacher(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(seen[0], F.interpolate(wanted, 12, mode="bicubic"), atol=1e-5)


def test_teacher_blocks_keep_their_distance_from_the_last(tmp_path):
    for depth, blocks in ((12, [7, 9, 11]), (24, [19, 21, 23])):
        config = dict(img_size=8, patch_size=2, embed_dim=24, depth=depth, num_heads=2, num_classes=0)
        torch.save({"config": config, "model": VisionTransformer(**config).state_dict()}, tmp_path / "t")
        assert haste.load_teacher(str(tmp_path / "t"), 4, (7, 9, 11)).blocks == blocks
    config["depth"] = 4
    torch.save({"config": config, "model": VisionTransformer(**config).state_dict()}, tmp_path / "t")
    with pytest.raises(UserError, match="could not be loaded"):
        haste.load_teacher(str(tmp_path / "t"), 4, (7, 9, 11))


# ---- 3, 4, 5. Samplers, losses, the trigger ----------------------------------------------------------------


class GaussianVelocity(nn.Module):
    """The exact velocity of data from N(0, c^2): E[eps - x0 | x_t]."""

    process, null_label, c = haste.Flow, 3, 0.5

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item(), y.tolist()))
        s = t.view(-1, 1, 1, 1).double()
        return ((s - (1 - s) * self.c**2) / ((1 - s) ** 2 * self.c**2 + s**2) * x).to(x.dtype)


def test_samplers_turn_noise_into_data():
    noise, y = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(4).long()
    ode, heun = (haste.sample(GaussianVelocity(), noise, y, steps=100, mode=m) for m in ("ode", "heun"))
    exact = 0.5 * noise.double()  # the flow of a Gaussian is a scaling
    assert (ode - exact).abs().max() < 0.05 and (heun - exact).abs().max() < 0.003
    torch.manual_seed(0)
    sde = haste.sample(GaussianVelocity(), noise, y)
    assert sde.std().item() == pytest.approx(0.5, abs=0.02) and sde.dtype == torch.float64
    assert torch.corrcoef(torch.stack([sde.flatten(), noise.flatten()]))[0, 1] < 0.5
    with pytest.raises(UserError, match="no sampler ddpm"):
        haste.sample(GaussianVelocity(), noise, y, mode="ddpm")


def test_guidance_doubles_the_batch_only_inside_its_interval():
    noise, y = torch.randn(2, 1, 2, 2), torch.tensor([0, 2])
    for mode, evaluations in (("sde", 6), ("ode", 6), ("heun", 11)):
        model = GaussianVelocity()
        haste.sample(model, noise, y, 6, 2.0, (0.3, 0.7), mode)
        assert len(model.calls) == evaluations
        for n, t, labels in model.calls[::2] if mode == "heun" else model.calls:
            assert (n, labels) == ((4, [0, 2, 3, 3]) if 0.3 <= t <= 0.7 else (2, [0, 2]))
    pairs = zip(model.calls[::2], model.calls[1::2])
    assert all(first[0] == second[0] for first, second in pairs)  # Heun's second keeps the decision


def test_paper_protocol_takes_250_evaluations_from_1_to_004():
    model = GaussianVelocity()
    haste.sample(model, torch.randn(1, 1, 2, 2), torch.tensor([0]))
    assert [t for _, t, _ in model.calls] == pytest.approx(np.linspace(1, 0.04, 250).tolist())


def test_feature_loss_is_the_mean_negative_cosine():
    z, y = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    naive = -sum(z[b, n] @ y[b, n] / z[b, n].norm() / y[b, n].norm() for b in range(2) for n in range(3)) / 6
    assert haste.feature_loss(z, y).item() == pytest.approx(naive.item(), rel=1e-5)
    assert haste.feature_loss(1e4 * z.half(), z).item() == pytest.approx(-1, abs=1e-3)  # fp16 would overflow


def naive_attention_loss(student, teacher):
    """Row by row, in fp64, with gradients."""
    total = []
    for (q, k), (q_t, k_t) in zip(student, teacher):
        for h in range(min(q.shape[1], q_t.shape[1], 12)):
            a = (q[:, h].double() @ k[:, h].double().mT / math.sqrt(q.shape[3])).softmax(-1)
            a_t = (q_t[:, h].double() @ k_t[:, h].double().mT / math.sqrt(q_t.shape[3])).softmax(-1)
            total.append(-(a_t * a.log()).sum(-1).mean())
    return sum(total) / len(total)


@pytest.mark.parametrize("heads, teacher_heads", [(6, 12), (12, 12), (16, 12), (4, 2)])
def test_attention_loss_is_the_mean_cross_entropy_of_paired_heads(heads, teacher_heads):
    torch.manual_seed(0)
    student = [tuple(torch.randn(2, heads, 5, 6, requires_grad=True) for _ in "qk") for _ in range(2)]
    teacher = [tuple(torch.randn(2, teacher_heads, 5, 4) for _ in "qk") for _ in range(2)]
    loss, naive = haste.attention_loss(student, teacher), naive_attention_loss(student, teacher)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    inputs = [x for pair in student for x in pair]
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(naive, inputs)):
        assert torch.allclose(a, b, atol=1e-6)


def test_attention_loss_of_many_pieces_is_that_of_one(monkeypatch):
    torch.manual_seed(0)
    student, teacher = ([tuple(torch.randn(3, 12, 800, 4) for _ in "qk")] for _ in range(2))  # 3 maps a piece
    assert haste.attention_loss(student, teacher).item() == pytest.approx(
        naive_attention_loss(student, teacher).item(), rel=1e-5
    )


def test_uniform_student_has_attention_loss_log_n():
    zero, q, k = torch.zeros(1, 3, 256, 8), 2 * torch.randn(1, 3, 256, 8), torch.randn(1, 3, 256, 8)
    assert haste.attention_loss([(zero, zero)], [(q, k)]).item() == pytest.approx(math.log(256), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_loss_is_finite_at_logit_gaps_past_100(dtype):
    q = torch.tensor([[300.0], [1.0]]).view(1, 1, 2, 1).to(dtype).requires_grad_()
    k = torch.tensor([[1.0], [0.0]]).view(1, 1, 2, 1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = haste.attention_loss([(q, k)], [(torch.tensor([[300.0], [0.0]]).view(1, 1, 2, 1), k.flip(2))])
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and loss > 50 and q.grad.isfinite().all()


def test_diffusion_loss_by_hand_and_terms_of_weight_0_left_out():
    model, y, t = awake(tiny_model()), torch.tensor([1, 2]), torch.tensor([0.25, 0.75])
    x0, eps = torch.randn(2, 2, 3, 8, 8)
    x_t = torch.stack([0.75 * x0[0] + 0.25 * eps[0], 0.25 * x0[1] + 0.75 * eps[1]])
    given = model, haste.Flow, x0, eps, t, y
    diff, repa, atta = haste.losses(*given, None, 1, 1)
    assert diff.item() == pytest.approx((model(x_t, t, y) - eps + x0).square().mean().item(), rel=1e-6)
    target = haste.Teacher(tiny_vit(), (1, 2), 4)(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    both, no_r, no_a = (haste.losses(*given, target, *weights) for weights in ((1, 1), (0, 1), (1, 0)))
    assert (
        not repa
        and not atta
        and no_r[1] == 0 == no_a[2]
        and no_r[2] == both[2] != 0
        and no_a[1] == both[1] != 0
    )


class OneWeight(nn.Module):
    """v = w everywhere, z = (w, 1): with features (1, 0), alignment wants a larger w, L_diff w = eps - x0."""

    process, feature_block = haste.Flow, 1

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False)])
        nn.init.ones_(self.blocks[0].weight)

    def forward(self, x, t, y, align=False):
        w = self.blocks[0].weight.view(())
        return w.expand_as(x), torch.stack([w, torch.ones(())]).expand(len(x), 1, 2), []


@pytest.mark.parametrize("wish, cosine", [(2.0, 1.0), (0.0, -1.0)])
def test_gradients_of_alignment_and_denoising(wish, cosine):
    target, x0 = (torch.tensor([[[1.0, 0.0]]]).expand(3, 1, 2), []), torch.zeros(3, 1, 2, 2)
    align, denoise = haste.gradients(OneWeight(), 0.5, x0, x0 + wish, torch.zeros(3).long(), target, 0.5, 0)
    assert F.cosine_similarity(align, denoise, dim=0).item() == pytest.approx(cosine)
    assert denoise.item() == pytest.approx(2 * (1 - wish))


def test_trigger_averages_gradients_over_images_and_runs_the_teacher_once_each(world, monkeypatch):
    data, args = haste.Data(world / "data"), flags(world, "unused", "--tau-images", 10)
    data.with_images, seen = True, []
    pulls = {0: 1.0, 1: -9.0}  # by parts: the mean of cosines would be 0, that of gradients decides

    def gradients(model, t, x0, *rest):
        return torch.tensor([[1.0], [pulls[len(seen) % 2]]])

    def teacher(images):
        seen.append(len(images))

    monkeypatch.setattr(haste, "gradients", gradients)
    assert haste.measure_cosines(None, teacher, data, args, 0, 5) == [-1.0] * 4 and seen == [5, 5]


# ---- 6. Data -----------------------------------------------------------------------------------------------


def test_order_is_one_permutation_after_another_on_any_number_of_processes():
    def stream(rows):
        return list(haste.batch_indices(10, 3, 6, rows, range(5)))

    whole = [i for batch in stream(slice(0, 6)) for i in batch]
    assert sorted(whole[:10]) == sorted(whole[10:20]) == list(range(10)) and whole[:10] != whole[10:20]
    halves = zip(stream(slice(0, 3)), stream(slice(3, 6)))
    assert [i for a, b in halves for i in a + b] == whole


def test_noise_is_a_function_of_seed_and_step():
    a, b, c = haste.draw(8, (1, 2, 2), 0, 5), haste.draw(8, (1, 2, 2), 0, 5), haste.draw(8, (1, 2, 2), 0, 6)
    assert all(map(torch.equal, a, b)) and not any(map(torch.equal, a, c))
    assert 0 <= a[0].min() and a[0].max() < 1 and not torch.equal(a[2], a[3])


def test_crop_is_adms():
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    small = image.reshape(32, 2, 48, 2, 3).mean((1, 3)).round().reshape(16, 2, 24, 2, 3).mean((1, 3))
    got = np.asarray(haste.center_crop(Image.fromarray(image), 16)).astype(float)
    assert np.abs(got - small[:, 4:20]).max() <= 2  # two halvings with BOX, then the middle
    once = Image.fromarray(image).resize((48, 32), Image.BOX).resize((30, 20), Image.BICUBIC)
    assert np.array_equal(
        np.asarray(haste.center_crop(Image.fromarray(image), 20)), np.asarray(once)[:, 5:25]
    )


@pytest.mark.parametrize("damaged", [False, True])
def test_exif_orientation_is_heeded_even_beside_damaged_tags(damaged):
    image, exif = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3)), Image.Exif()
    exif[0x0112] = 6
    image.getexif().update(exif)
    if damaged:
        image.getexif()[0x011A] = "not a number"
        image.info["exif"] = b"rubbish"
    turned = haste.upright(image)
    assert turned.size == (2, 4) and turned.mode == "RGB"


def test_prepare_writes_repas_layout_and_names_what_it_leaves_out(tmp_path, capsys):
    source = tmp_path / "source"
    save_images(source, 8)
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        save_images(source / hidden, 2)
    (source / "class0" / "._00.png").write_bytes(b"mac")
    (source / "class1" / "broken.png").write_bytes(b"no image")
    (source / "class1" / "clip.gif").write_bytes(b"gif")
    Image.new("RGB", (9, 9)).save(source / "class2" / "a.bmp")
    (tmp_path / "elsewhere").mkdir()
    Image.new("L", (20, 9)).save(tmp_path / "elsewhere" / "b.TIF")
    (source / "class3" / "link").symlink_to(tmp_path / "elsewhere")
    (source / "class3" / "circle").symlink_to(source / "class3")
    prepare(source, tmp_path / "data")
    printed = "".join(capsys.readouterr())
    data = haste.Data(tmp_path / "data")
    assert data.classes == ["class0", "class1", "class2", "class3"] and len(data) == 10
    assert np.bincount(data.labels).tolist() == [2, 2, 3, 3] and data.names[0] == "00000/img00000000.png"
    assert "class1/broken.png" in printed and "1 damaged" in printed and "clip.gif" in printed
    assert data[0]["image"].shape == (3, 8, 8) and "class0, class1" in printed


@pytest.mark.parametrize(
    "tree, words",
    [
        ("flat", "put a flat folder into one"),
        ("split", "folder of images"),
        ("hollow", "empty: class9"),
        ("nothing", "folder of images"),
    ],
)
def test_prepare_refuses_trees_without_classes(tmp_path, tree, words):
    folder = tmp_path / tree
    folder.mkdir()
    if tree == "flat":
        Image.new("RGB", (9, 9)).save(folder / "a.png")
    elif tree == "split":
        save_images(folder / "train"), save_images(folder / "val")
    elif tree == "hollow":
        save_images(folder), (folder / "class9").mkdir()
    with pytest.raises(UserError, match=words):
        prepare(folder, tmp_path / "data")


def test_interrupted_prepare_resumes_and_ends_the_same(world, tmp_path, monkeypatch):
    real, calls = haste.write_crops, []

    def dying(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(haste, "write_crops", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(world / "images", tmp_path / "data")
    assert not (tmp_path / "data/images/dataset.json").exists()
    with pytest.raises(UserError, match="no dataset"):
        haste.Data(tmp_path / "data")
    prepare(world / "images", tmp_path / "data")
    assert len(calls[2][-1]) == 8  # only what was missing
    a, b = haste.Data(world / "data"), haste.Data(tmp_path / "data")
    assert len(a) == len(b) and all(torch.equal(a[i]["image"], b[i]["image"]) for i in range(40))
    with pytest.raises(UserError, match="begun differently"):
        prepare(world / "images", tmp_path / "data", "--resolution", 16)


class StubVAE(nn.Module):
    """Latents are every second pixel; std is 0.1; decoding repeats pixels."""

    config = types.SimpleNamespace(scaling_factor=0.5, latent_channels=3)

    def encode(self, x):
        mean = x[:, :, ::2, ::2]
        return types.SimpleNamespace(
            latent_dist=types.SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.1))
        )

    def decode(self, z):
        return types.SimpleNamespace(sample=z.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.fixture(scope="module")
def latents(world):
    """The world's images, prepared with a VAE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(haste, "load_vae", lambda name: StubVAE())
        prepare(world / "images", world / "latents", "--vae", "stub")
    return world


def test_latents_are_mean_and_std_and_x0_is_drawn_from_them(latents):
    data = haste.Data(latents / "latents")
    batch = haste.default_collate([data[i] for i in range(4)])
    assert "image" not in batch and batch["moments"].shape == (4, 6, 4, 4) and data.shape == (3, 4, 4)
    xi, mean = torch.randn(4, 3, 4, 4), batch["moments"][:, :3]
    assert torch.allclose(data.x0(batch, xi), 0.5 * (mean + 0.1 * xi), atol=1e-6)
    data.with_images = True
    assert torch.allclose(data[0]["image"][:, ::2, ::2] / 127.5 - 1, data[0]["moments"][:3], atol=1e-6)


def repa_folder(folder, labels, channels=4):
    for i in range(len(labels)):
        path = folder / haste.NPY.format(0, i)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.ones((2 * channels, 8, 8), np.float32))
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(len(labels))]
    listing = json.dumps({"labels": [list(pair) for pair in zip(names, labels)]})
    (folder / "vae-sd/dataset.json").write_text(listing, "utf-8-sig")


def test_repas_dataset_trains_as_it_is(world, tmp_path):
    repa_folder(tmp_path, [0, "7", 2.0, 1] * 3)
    data = haste.Data(tmp_path)
    assert (data.vae, data.scale, len(data.classes)) == (haste.VAE_ENCODER, 0.18215, 8)
    args = flags(world, tmp_path, "--data-dir", tmp_path, "--tau", 0)
    assert haste.train(args) is None


@pytest.mark.parametrize(
    "labels, channels, words",
    [
        ([0, None], 4, "img-mean-std-00000001"),
        ([0, 1.5], 4, "whole number"),
        ([], 4, "whole number"),
        ([0, 1], 16, "does not name a VAE of 16 channels"),
    ],
)
def test_dataset_with_unusable_labels_or_unknown_vae_is_refused(tmp_path, labels, channels, words):
    repa_folder(tmp_path, labels or [0], channels)
    if not labels:
        (tmp_path / "vae-sd/dataset.json").write_text('{"labels": null}')
    with pytest.raises(UserError, match=words):
        haste.Data(tmp_path)


def test_damaged_file_of_a_dataset_is_named(world, tmp_path):
    save_images(tmp_path / "i", 8, 1)
    prepare(tmp_path / "i", tmp_path / "data")
    (tmp_path / "data/images/00000/img00000003.png").write_bytes(b"torn")
    with pytest.raises(UserError, match="img00000003"):
        train(world, tmp_path, "--data-dir", tmp_path / "data", "--tau", 0)


def test_labels_are_dropped_at_the_rate_of_cfg_prob(world):
    data, u = haste.Data(world / "data"), torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    y = data.condition({"y": torch.ones(20_000).long()}, u, 0.1)
    assert (y == 4).float().mean().item() == pytest.approx(0.1, abs=0.01) and set(y.tolist()) == {1, 4}
    assert not (data.condition({"y": torch.ones(20_000).long()}, u, 0.0) == 4).any()


# ---- 7. Checkpoints and VAEs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A run through both phases, with two grids."""
    out = tmp_path_factory.mktemp("trained")
    train(world, out, "--sampling-steps", 3, "--cfg-prob", 0.5)
    return out


def saved_as(state, folder, name="0000000.pt"):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name)
    return folder / name


@pytest.mark.parametrize(
    "change",
    [
        "bare",
        "ddp",
        "compiled",
        "no args",
        "no ema",
        "numpy and paths",
        "old format",
        "no projector",
        "namespace",
    ],
)
def test_other_trainers_checkpoints_load_for_sampling_and_as_a_start(
    world, trained, tmp_path, capsys, change
):
    saved = checkpoint(trained, 6)
    saved["args"] = {"model": "SiT-XS/2", "num_classes": 4}
    if change == "bare":
        saved = saved["ema"]
    elif change in ("ddp", "compiled"):
        rename = (
            "module.{}".format if change == "ddp" else lambda k: k.replace("blocks.", "blocks._orig_mod.")
        )
        saved["ema"], saved["model"] = (
            {rename(k): x for k, x in saved[key].items()} for key in ("ema", "model")
        )
    elif change == "no args":
        saved["args"] = None
    elif change == "no ema":
        del saved["ema"], saved["opt"]
    elif change == "numpy and paths":
        saved["args"] |= {"lr": np.float64(1), "n": np.int64(3), "dir": pathlib.PosixPath("/x")}
    elif change == "no projector":
        for key in ("ema", "model"):
            saved[key] = {k: x for k, x in saved[key].items() if not k.startswith("projectors")}
    elif change == "namespace":
        saved["args"] = argparse.Namespace(**saved["args"])
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=change != "old format")
    model, args = haste.load_ema(tmp_path / "x.pt", "SiT-XS/2")
    wanted = checkpoint(trained, 6)["ema" if change != "no ema" else "model"]
    assert all(torch.equal(x, wanted[k]) for k, x in model.state_dict().items() if not k.startswith("proj"))
    assert args["vae"] is None and model.num_classes == 4
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    (tmp_path / "x.pt").rename(folder / "0000000.pt")
    args = flags(world, tmp_path, "--max-train-steps", 5 if change in ("bare", "no projector") else 8)
    assert haste.train(args) is None
    anew = "starts from zero" in capsys.readouterr().out
    assert anew == (change in ("bare", "no ema", "no projector"))


@pytest.mark.parametrize(
    "args, words",
    [
        ({"path_type": "cosine"}, "cosine"),
        ({"path_type": "GVP"}, "gvp"),
        ({"prediction": "score"}, "score"),
        ({"prediction": "noise", "path_type": "Linear"}, "noise"),
    ],
)
def test_checkpoint_of_another_process_is_refused(trained, tmp_path, args, words):
    saved_as({"ema": checkpoint(trained, 6)["ema"], "args": args | {"model": "SiT-XS/2"}}, tmp_path)
    with pytest.raises(UserError, match=words):
        haste.load_ema(tmp_path / "0000000.pt", None)


@pytest.mark.parametrize(
    "key", ["decoder_blocks.0.weight", "projectors.1.0.weight", "blocks.0.attn.q_norm.weight"]
)
def test_checkpoint_of_another_model_is_refused_with_its_first_key(trained, tmp_path, key):
    state = checkpoint(trained, 6)["ema"] | {key: torch.ones(3)}
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        haste.load_ema(saved_as(state, tmp_path), "SiT-XS/2")
    with pytest.raises(UserError, match="name the right --model"):
        haste.load_ema(saved_as({"ema": checkpoint(trained, 6)["ema"]}, tmp_path), "SiT-S/2")


class Payload:
    def __reduce__(self):
        return os.system, ("true",)


def test_nothing_in_a_checkpoint_is_unpickled_and_its_type_is_named(tmp_path):
    with pytest.raises(UserError, match="posix.system"):
        haste.read_checkpoint(saved_as({"model": {}, "args": Payload()}, tmp_path), "SiT-XS/2")


def sits_own(model, x, t, y):
    """SiT's convention for the weights of `model` with 2C output channels: the first C, time turned."""
    state = model.state_dict()
    angle = t[:, None] * haste.frequencies()
    hidden = torch.cat([angle.cos(), angle.sin()], 1) @ state["t_embedder.mlp.0.weight"].T
    hidden = F.silu(hidden + state["t_embedder.mlp.0.bias"])
    c = hidden @ state["t_embedder.mlp.2.weight"].T + state["t_embedder.mlp.2.bias"] + model.y_embedder(y)
    tokens = model.x_embedder(x) + model.pos_embed
    for block in model.blocks:
        tokens, _ = block(tokens, c)
    return haste.unpatchify(model.final_layer(tokens, c), 2)[:, : x.shape[1]]


def test_sits_own_checkpoints_are_converted_exactly(tmp_path, world):
    torch.manual_seed(0)
    theirs = awake(haste.build_model("SiT-XS/2", input_size=8, in_channels=3, num_classes=4, out_channels=6))
    state = {k: x for k, x in theirs.state_dict().items() if not k.startswith("projectors")}
    path = saved_as(
        {
            "ema": state,
            "args": argparse.Namespace(
                model="SiT-XS/2", path_type="Linear", prediction="velocity", vae="ema"
            ),
        },
        tmp_path / "run/checkpoints",
    )
    ours, args = haste.load_ema(path, None)
    x, t, y = torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([0, 1, 4])
    with torch.no_grad():
        wanted = -sits_own(theirs, x, 1 - t, y)
        assert torch.allclose(ours(x, t, y), wanted, atol=2e-5) and wanted.abs().max() > 0.1
    assert haste.train(flags(world, tmp_path)) is None  # and it can start a HASTE run
    as_dit, _ = haste.load_ema(saved_as(state, tmp_path, "dit.pt"), "DiT-XS/2")
    assert isinstance(as_dit, haste.DiT)  # the same shapes are a DiT's under a DiT's name


@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_damaged_newest_checkpoint_is_passed_over_by_name(world, trained, tmp_path, capsys, harm):
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    for step in (4, 6):
        raw = bytearray((trained / f"run/checkpoints/{step:07d}.pt").read_bytes())
        if step == 6:
            raw[len(raw) // 2] ^= 255
            raw = raw[: len(raw) // 2] if harm == "cut" else raw
        (folder / f"{step:07d}.pt").write_bytes(raw)
    (folder / "0000008.pt.part").write_bytes(b"a killed save")
    train(world, tmp_path, "--cfg-prob", 0.5)
    assert "0000006.pt is damaged" in capsys.readouterr().out and not list(folder.glob("*.part"))
    assert same(checkpoint(tmp_path, 6), checkpoint(trained, 6))
    (folder / "0000006.pt").unlink(), (folder / "0000004.pt").write_bytes(b"PK cut")
    with pytest.raises(UserError, match="no whole checkpoint"):
        train(world, tmp_path)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"_class_name": "AutoencoderKL", "shift_factor": 0.1}, "without shifts"),
    ],
)
def test_vae_of_another_kind_is_refused(tmp_path, config, words):
    pytest.importorskip("diffusers")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        haste.load_vae(str(tmp_path))


def test_real_vae_is_loaded_and_checked_for_missing_weights(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    safetensors = pytest.importorskip("safetensors.torch")
    diffusers.AutoencoderKL(block_out_channels=[32], latent_channels=4).save_pretrained(tmp_path)
    model = types.SimpleNamespace(in_channels=4)
    vae = haste.load_decoder("any", str(tmp_path), model)
    assert haste.to_images(torch.randn(2, 4, 8, 8), vae, 0.2).dtype == torch.uint8
    with pytest.raises(UserError, match="4 channels, the model 16"):
        haste.load_decoder("any", str(tmp_path), types.SimpleNamespace(in_channels=16))
    weights = safetensors.load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    weights.pop("decoder.conv_in.weight")
    safetensors.save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    haste.load_vae.cache_clear()
    with pytest.raises(UserError, match="decoder.conv_in.weight"):
        haste.load_vae(str(tmp_path))


def test_pixels_are_clamped_and_truncated_as_in_the_paper():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert haste.to_images(x, None, 1.0)[0, 0, 0].tolist() == [0, 0, 127, 254, 255]


# ---- 8. Training -------------------------------------------------------------------------------------------


def test_run_through_both_phases_leaves_checkpoints_metrics_and_grids(trained):
    assert sorted(p.name for p in (trained / "run/checkpoints").iterdir()) == [
        f"{step:07d}.pt" for step in (2, 3, 4, 6)
    ]
    assert [line["phase"] for line in metrics(trained)] == [1, 1, 1, 2, 2, 2]
    for line in metrics(trained):
        aligned = line["loss_diff"] + 0.5 * line["loss_repa"] + 0.5 * line["loss_atta"]
        assert line["loss"] == pytest.approx(aligned, rel=1e-5) and (line["loss_atta"] > 0) == (
            line["phase"] == 1
        )
    assert [p.name for p in sorted((trained / "run/samples").iterdir())] == ["0000003.png", "0000006.png"]
    saved = checkpoint(trained, 6)
    assert saved["args"]["classes"] == ["class0", "class1", "class2", "class3"] and saved["steps"] == 6


def test_nothing_of_phase_one_runs_after_tau(latents, tmp_path, monkeypatch):
    taught, shown, losses = [], [], []
    real_teacher, real_open, real_loss = haste.Teacher.forward, Image.open, haste.attention_loss
    monkeypatch.setattr(haste.Teacher, "forward", lambda *a: taught.append(1) or real_teacher(*a))
    monkeypatch.setattr(Image, "open", lambda *a: shown.append(1) or real_open(*a))
    monkeypatch.setattr(haste, "attention_loss", lambda *a: losses.append(1) or real_loss(*a))
    train(latents, tmp_path, data="latents")
    assert (len(taught), len(shown), len(losses)) == (3, 3 * 8, 3)
    before, after = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    projector = [k for k in after["model"] if k.startswith("projectors")]
    assert all(torch.equal(before[s][k], after[s][k]) for s in ("model", "ema") for k in projector)
    assert not torch.equal(
        before["model"]["x_embedder.proj.weight"], after["model"]["x_embedder.proj.weight"]
    )


def test_tau_0_never_loads_a_teacher_and_lambda_a_0_is_repa(world, tmp_path, monkeypatch):
    train(world, tmp_path / "plain", "--tau", 0, "--teacher", "no such teacher")
    monkeypatch.setattr(haste, "attention_loss", None)
    train(world, tmp_path / "repa", "--tau", "never", "--lambda-a", 0)
    assert all(line["loss_repa"] and not line["loss_atta"] for line in metrics(tmp_path / "repa"))
    with pytest.raises(UserError, match="no such teacher"):
        train(world, tmp_path / "aligned", "--teacher", "no such teacher")


@pytest.mark.parametrize(
    "kind",
    [
        [],
        ["--gradient-accumulation-steps", 2],
        ["--precision", "fp16"],
        ["--precision", "bf16"],
        ["--model", "DiT-XS/2"],
    ],
)
def test_resume_is_bit_exact(world, tmp_path, kind):
    train(world, tmp_path / "whole", *kind)
    for stop in (2, 3, 4):  # before, at and after tau
        train(world, tmp_path / f"{stop}", *kind, "--max-train-steps", stop)
        train(world, tmp_path / f"{stop}", *kind)
        assert same(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / f"{stop}", 6))


def test_accumulation_equals_one_batch(world, tmp_path):
    for parts in (1, 4):
        train(world, tmp_path / f"{parts}", "--gradient-accumulation-steps", parts, "--learning-rate", 1e-4)
    one, four = (checkpoint(tmp_path / f"{parts}", 6)["model"] for parts in (1, 4))
    assert max((one[k] - four[k]).abs().max() for k in one) < 1e-4


def test_ema_starts_at_the_initial_weights_and_follows(world, tmp_path):
    args = flags(world, tmp_path, "--ema-decay", 0.5, "--max-train-steps", 2, "--checkpointing-steps", 1)
    haste.train(args)
    torch.manual_seed(0)
    ema = haste.build_model(
        "SiT-XS/2", input_size=8, in_channels=3, num_classes=4, teacher_dim=24
    ).state_dict()
    for step in (1, 2):
        saved = checkpoint(tmp_path, step)
        ema = {k: (x + saved["model"][k]) / 2 for k, x in ema.items()}
        assert all(torch.allclose(saved["ema"][k], ema[k], atol=1e-6) for k in ema)


def test_gradients_are_clipped_to_the_norm_asked_for(world, tmp_path, monkeypatch):
    norms, real = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda p, norm: norms.append(norm) or real(p, norm))
    train(world, tmp_path / "a", "--max-grad-norm", 0.1, "--max-train-steps", 1)
    train(world, tmp_path / "b", "--max-grad-norm", 0, "--max-train-steps", 1)
    assert norms == [0.1, math.inf]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_step_that_is_not_finite_is_skipped(world, tmp_path, monkeypatch, precision):
    real, seen = haste.losses, []

    def poisoned(*given):
        seen.append(1)
        diff, *rest = real(*given)
        return diff * math.nan if len(seen) == 3 else diff, *rest

    monkeypatch.setattr(haste, "losses", poisoned)
    train(world, tmp_path, "--precision", precision, "--checkpointing-steps", 1, "--tau", 0)
    before, after = checkpoint(tmp_path, 2), checkpoint(tmp_path, 3)
    assert same(before["model"], after["model"]) and same(before["opt"], after["opt"])
    assert not same(after["model"], checkpoint(tmp_path, 4)["model"])
    assert [line["skipped_steps"] for line in metrics(tmp_path)] == [
        0,
        0,
        1,
        1,
        0,
        0,
    ]  # reported until one is taken


def test_too_many_skipped_steps_in_a_row_end_the_run(world, tmp_path, monkeypatch):
    real = haste.losses
    monkeypatch.setattr(haste, "MAX_SKIPPED", 3)
    monkeypatch.setattr(haste, "losses", lambda *a: [loss * math.inf for loss in real(*a)])
    with pytest.raises(UserError, match="no finite gradient in 3 steps"):
        train(world, tmp_path, "--tau", 0)


def test_auto_fires_once_and_a_resumed_run_does_not_ask_again(world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(haste, "measure_cosines", lambda *a: asked.append(a[4]) or [0.3, 0.3, 0.3, -1.1])
    auto = "--tau", "auto", "--tau-from", 2, "--tau-every", 2, "--tau-cosine", -0.04
    train(world, tmp_path, *auto, "--max-train-steps", 3)
    assert asked == [2] and checkpoint(tmp_path, 3)["tau"] == 2
    train(world, tmp_path, *auto)
    assert asked == [2] and [line["phase"] for line in metrics(tmp_path) if "phase" in line] == [
        1,
        1,
        2,
        2,
        2,
        2,
    ]
    train(world, tmp_path / "number", "--max-train-steps", 2)
    train(world, tmp_path / "number", *auto[:-1], -2)  # began with a number, and never fires
    assert asked == [2, 2, 4] and checkpoint(tmp_path / "number", 6)["tau"] is None


def launch(argv, processes=0, **more):
    start = (
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        if processes
        else [sys.executable]
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*start, HASTE, *map(str, argv)], **pipes | {"env": env} | more)


def line(world, out, *more):
    return (
        f"--model SiT-XS/2 --data-dir {world / 'data'} --teacher {world / 'teacher.pt'} --output-dir {out} "
        f"--exp-name run --batch-size 8 --max-train-steps 6 --tau 3 --checkpointing-steps 2 --log-every 1 "
        f"--sampling-steps 0 --num-workers 0 --learning-rate 1e-3"
    ).split() + list(map(str, more))


def test_two_processes_do_what_one_does(world, tmp_path):
    train(world, tmp_path / "one")
    process = launch(line(world, tmp_path / "two"), processes=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    one, two = (checkpoint(tmp_path / kind, 6) for kind in ("one", "two"))
    assert max((one["model"][k] - two["model"][k]).abs().max() for k in one["model"]) < 1e-3
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_compiled_blocks_share_two_graphs_and_give_the_same_losses(world, tmp_path, monkeypatch):
    train(world, tmp_path / "eager", "--tau", 3)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(1)
        return graph.forward

    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: real(self, backend=backend, **how))
    train(world, tmp_path / "compiled", "--tau", 3, "--compile")
    assert len(graphs) <= 2
    for a, b in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_compiling_without_a_compiler_is_one_sentence(world, tmp_path, monkeypatch):
    monkeypatch.setattr(haste.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="install g"):
        train(world, tmp_path, "--compile", "--tau", 0)


# --- Faults


def wait_for(path, process, count=1):
    end = time.time() + 100
    while len(list(path.glob("*.pt"))) < count:
        assert time.time() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("name, processes", [("SIGTERM", 0), ("SIGHUP", 0), ("SIGTERM", 2)])
def test_stop_signal_saves_once_and_asks_to_be_started_again(world, tmp_path, name, processes):
    process = launch(line(world, tmp_path, "--max-train-steps", 100_000), processes)
    wait_for(tmp_path / "run/checkpoints", process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == (1 if processes else 75), err
    saved = max((tmp_path / "run/checkpoints").iterdir())
    assert (
        saved.suffix == ".pt"
        and checkpoint(tmp_path, int(saved.stem))["steps"] == metrics(tmp_path)[-1]["step"]
    )
    assert f"stopped after step {int(saved.stem)}" in out


def test_hangup_that_nohup_ignores_stays_ignored_and_nobody_need_read_the_output(world, tmp_path):
    process = launch(
        line(world, tmp_path, "--max-train-steps", 40),
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.stdout.close()
    wait_for(tmp_path / "run/checkpoints", process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0 and (tmp_path / "run/checkpoints/0000040.pt").exists()


def test_signal_ends_a_wait_for_data_and_the_work_is_saved(world, tmp_path, monkeypatch):
    real, reads = haste.Data.__getitem__, []

    def starving(self, i):
        reads.append(i)
        if len(reads) == 1 + 2 * 8 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, i)

    monkeypatch.setattr(haste.Data, "__getitem__", starving)
    assert train(world, tmp_path, "--checkpointing-steps", 100) == 75
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["0000002.pt"]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_second_ctrl_c_acts_at_once():
    stop = haste.StopSignals()
    stop.busy = True
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.caught == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_failing_loader_ends_with_a_sentence_about_shared_memory(world, tmp_path, monkeypatch):
    def starved(self, i):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    data = haste.Data(world / "data")
    monkeypatch.setattr(haste.Data, "__getitem__", starved)
    loader = haste.DataLoader(data, batch_size=2, num_workers=1, worker_init_fn=haste.ignore_stop_signals)
    with pytest.raises(UserError, match=r"shm-size.*num-workers 0.*No space left on device"):
        next(haste.load_batches(loader, haste.StopSignals()))


def test_wandb_gets_a_safe_id_and_its_errors_are_one_sentence(world, tmp_path, monkeypatch):
    stub, lines = types.ModuleType("wandb"), []
    stub.run, stub.log = None, lambda line, step: lines.append(step)
    stub.init = lambda **how: setattr(stub, "run", how)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    train(world, tmp_path, "--wandb", "project", "--exp-name", "a/b c")
    assert stub.run["id"] == "a-b-c" and lines == [1, 2, 3, 4, 5, 6]

    def refuse(**how):
        raise PermissionError("no API key\nrun wandb login")

    stub.run, stub.init = None, refuse
    with pytest.raises(UserError, match="no API key"):
        train(world, tmp_path, "--wandb", "project")


@pytest.mark.parametrize(
    "more, words",
    [
        (["--batch-size", 7, "--gradient-accumulation-steps", 2], "must divide into 2 equal parts"),
        (["--model", "SiT-XS/8", "--data-dir", "odd"], "needs inputs that divide by 8, not 12"),
        (["--teacher-blocks", 9], "must have the same length"),
        (["--attention-blocks", 1, 2, 6], "no block 6"),
        (["--model", "MMDiT"], "needs captions"),
        (["--data-dir", "nowhere"], "no dataset in nowhere"),
        (["--model", "SiT-M/2"], "unknown model SiT-M/2"),
        (["--model", "SiT"], "unknown model SiT"),
    ],
)
def test_flags_that_do_not_fit_get_one_sentence(world, tmp_path, more, words):
    if "odd" in more:
        prepare(world / "images", tmp_path / "odd", "--resolution", 12)
        more = more[:-1] + [tmp_path / "odd"]
    assert words in complaint(*line(world, tmp_path, *more))


def test_checkpoint_of_another_model_is_kept_and_refused(world, trained, tmp_path):
    saved_as(torch.load(trained / "run/checkpoints/0000006.pt"), tmp_path / "run/checkpoints", "0000001.pt")
    assert "another --exp-name" in complaint(*line(world, tmp_path, "--model", "SiT-XS/4", "--cfg-prob", 0.5))
    assert (tmp_path / "run/checkpoints/0000001.pt").exists()


def test_rank_without_world_size_is_one_sentence(world, tmp_path):
    process = launch(line(world, tmp_path), env=os.environ | {"RANK": "0"})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "torchrun" in err and "Traceback" not in err


def test_defaults_are_the_papers(capsys):
    args = parse("")
    assert (
        args.model,
        args.batch_size,
        args.learning_rate,
        args.ema_decay,
        args.cfg_prob,
        args.max_grad_norm,
    ) == ("SiT-XL/2", 256, 1e-4, 0.9999, 0.1, 1.0)
    assert (
        args.lambda_r,
        args.lambda_a,
        args.tau_from,
        args.tau_every,
        args.tau_images,
        args.tau_cosine,
    ) == (0.5, 0.5, 50_000, 10_000, 2048, -0.05)
    taus = {
        name: haste.parse_name(name)[1].tau
        for name in ("SiT-B/2", "SiT-L/2", "SiT-XL/2", "DiT-XL/2", "MMDiT")
    }
    assert list(taus.values()) == [100_000, 250_000, 250_000, 250_000, 200_000]
    big = types.SimpleNamespace(shape=(4, 64, 64), captions=None, images=Path("/"))
    haste.resolve(args, big)
    assert (
        args.tau == 300_000
        and args.attention_blocks == (4, 5, 6, 7)
        and args.teacher_blocks == (8, 9, 10, 11)
    )
    assert parse("--early-stop-point 7 --proj-coeff 1 --attn-coeff 2 --enc-type x").tau == 7
    with pytest.raises(SystemExit) as stop:
        parse("--tau sometimes")
    assert stop.value.code == 2 and "sometimes" in capsys.readouterr().err


def test_terminal_that_lacks_a_letter_does_not_end_a_run(tmp_path):
    with open(tmp_path / "terminal", "w", encoding="ascii") as terminal:
        haste.Output(terminal).write("caf\u00e9")
    assert (tmp_path / "terminal").read_text() == "caf\\xe9"


# ---- 9. Sampling -------------------------------------------------------------------------------------------


def test_sample_draws_the_labels_asked_for_and_names_their_classes(trained, tmp_path, capsys):
    haste.sample_from(
        parse(
            f"--sample {trained}/run/checkpoints/0000006.pt --labels 3 0 --num-steps 2 "
            f"--out {tmp_path / 'grid.png'}"
        )
    )
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * 9 + 1, 10)
    assert "3 class3, 0 class0" in capsys.readouterr().out
    assert "classes are 0 to 3" in complaint(
        "--sample", trained / "run/checkpoints/0000006.pt", "--labels", 4
    )


def test_model_without_label_dropout_cannot_be_guided(world, tmp_path):
    train(world, tmp_path, "--cfg-prob", 0, "--sampling-steps", 6)  # its grids are not
    path = tmp_path / "run/checkpoints/0000006.pt"
    assert "use --cfg-scale 1" in complaint("--sample", path, "--num-steps", 2, "--out", tmp_path / "x.png")
    haste.sample_from(parse(f"--sample {path} --num-steps 2 --cfg-scale 1 --out {tmp_path / 'x.png'}"))


# ---- 10. DiT and MM-DiT ------------------------------------------------------------------------------------


def test_dits_code_gives_the_same_figures(monkeypatch):
    """Loss, gradients and 12 respaced guided steps of facebookresearch/DiT, run on numpy's frozen streams."""
    sizes = dict(input_size=16, in_channels=4, hidden_size=96, num_classes=10)
    model = with_frozen_weights(tiny_model(haste.DiT, **sizes), without="projectors")
    x0, eps, t = 0.5 * frozen(1, 3, 4, 16, 16), frozen(2, 3, 4, 16, 16), torch.tensor([0, 0.0375, 0.8])
    y = torch.tensor([3, 7, 1])
    each = [
        haste.losses(model, haste.DDPM, *(x[i : i + 1] for x in (x0, eps, t, y)), None, 1, 1)[0].item()
        for i in range(3)
    ]
    assert each == pytest.approx([4.971220, 2.421021, 2.295545], rel=1e-5)
    haste.losses(model, haste.DDPM, x0, eps, t, y, None, 1, 1)[0].backward()
    wanted = {
        "x_embedder.proj.weight": 0.33424,
        "blocks.1.attn.qkv.weight": 0.605419,
        "final_layer.linear.weight": 2.372707,
    }
    named = dict(model.named_parameters())
    assert {name: named[name].grad.norm().item() for name in wanted} == pytest.approx(wanted, rel=1e-4)
    frozen_noise(monkeypatch)
    out = haste.sample(model, frozen(9, 3, 4, 16, 16), y, steps=12, cfg_scale=1.8, mode="ddpm")
    assert out[1, :, 11, 3].tolist() == pytest.approx(
        [-120.932564, -170.767593, -589.873779, -355.143188], rel=1e-4
    )
    assert out.abs().mean().item() == pytest.approx(226.444138, rel=1e-4)


def test_time_becomes_one_of_dits_1000_timesteps():
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    steps = haste.DDPM.add_noise(x, x, torch.rand(100_000, generator=torch.Generator().manual_seed(0)))[1]
    assert set(steps.tolist()) == set(range(1000)) and steps.mean().item() == pytest.approx(499.5, abs=3)
    assert haste.DDPM.add_noise(x, x, torch.tensor([0, 1 - 2**-24, 1.0]))[1].tolist() == [0, 999, 999]
    trigger = haste.DDPM.add_noise(x, x, torch.tensor(haste.TRIGGER_TIMES))[1]
    assert trigger.tolist() == [round(1000 * t) for t in haste.TRIGGER_TIMES]


@pytest.mark.parametrize("steps", [250, 21, 1000])
def test_respaced_schedule_against_bayes(steps):
    kept, at = [], 0.0
    for _ in range(steps):
        kept.append(round(at))
        at += 999 / (steps - 1)
    abars = [math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(t + 1)) for t in kept]
    timesteps, table = haste.ddpm_schedule(steps, torch.device("cpu"), torch.float64)
    assert timesteps == kept
    for i in (1, 2, steps // 2, steps - 1):
        before, abar = abars[i - 1], abars[i]
        keep = abar / before  # x_t = sqrt(keep) x_s + sqrt(1 - keep) noise
        precision = keep / (1 - keep) + 1 / (1 - before)
        by_hand = [
            abar**0.5,
            (1 - abar) ** 0.5,
            before**0.5 / (1 - before) / precision,
            keep**0.5 / (1 - keep) / precision,
            math.log(1 - keep),
            -math.log(precision),
        ]
        assert table[:, i].tolist() == pytest.approx(by_hand, rel=1e-9)


class GaussianNoise(nn.Module):
    """The exact noise in data from N(0, c^2), E[eps | x_t], of label 0; half of it for the null label."""

    null_label, process, c = 3, haste.DDPM, 0.5

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item(), y.tolist()))
        signal, noise, *_ = haste.ddpm_at(t.long(), x.double())
        half = torch.where(y == 3, 0.5, 1.0).view(-1, 1, 1, 1)
        eps = noise / (signal**2 * self.c**2 + noise**2) * x * half
        return torch.cat([eps, -torch.ones_like(eps)], dim=1).to(x.dtype)


@pytest.mark.parametrize("mode", ["ddpm", "sde"])
def test_dits_samplers_turn_noise_into_data_and_guide_three_channels(mode):
    noise, y = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(4).long()
    free, guided, model = GaussianNoise(), GaussianNoise(), GaussianNoise()
    torch.manual_seed(0)
    x = haste.sample(free, noise, y, mode=mode)
    assert x.std().item() == pytest.approx(0.5, abs=0.03)
    assert [t for _, t, _ in free.calls] == haste.ddpm_schedule(250, noise.device, torch.float64)[0][::-1]
    torch.manual_seed(0)
    g = haste.sample(guided, noise, y, cfg_scale=3.0, mode=mode)
    assert torch.equal(x[:, 3], g[:, 3]) and ((x - g)[:, :3] != 0).all()
    haste.sample(model, noise, y, 10, 3.0, (0.3, 0.7), mode)
    assert all(n == (8 if 300 <= t <= 700 else 4) for n, t, _ in model.calls) and len(model.calls) == 10


def test_dit_has_sits_network_and_loads_its_authors_names():
    with torch.device("meta"):
        model = haste.build_model("DiT-XL/2")
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("projectors"))
    assert (
        count == 675_129_632 and tiny_model(haste.DiT).state_dict().keys() == tiny_model().state_dict().keys()
    )


MMDIT = {k: x for k, x in TINY.items() if k != "attention_blocks"} | {"depth": 10, "feature_block": 8}


def test_released_mmdit_gives_the_same_figures():
    model = with_frozen_weights(
        haste.MMDiT(hidden_size=288, depth=9, num_heads=9, teacher_dim=48, projector_dim=96)
    )
    v, z, qk = model(frozen(1, 2, 4, 32, 32), torch.tensor([0.3, 0.8]), frozen(2, 2, 7, 768), align=True)
    assert v[0, :, 5, 9].tolist() == pytest.approx([-1.149736, -0.551603, 1.262833, -1.376827], rel=1e-4)
    assert z[0, 17, :3].tolist() == pytest.approx([0.203212, -0.38475, -0.734253], rel=1e-4)
    q, k = qk[2]
    assert (q @ k.mT / 32**0.5)[1, 3, 10, :3].tolist() == pytest.approx(
        [0.281714, 1.998466, -0.598364], rel=1e-4
    )
    v.square().mean().backward()
    wanted = {
        "context_embedder.weight": 0.066919,
        "joint_blocks.8.context_block.attn.qkv.weight": 0.020626,
        "joint_blocks.5.x_block.attn.qkv.weight": 0.395535,
    }
    named = dict(model.named_parameters())
    assert {name: named[name].grad.norm().item() for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_mmdits_parameters_are_those_of_the_released_code():
    with torch.device("meta"):
        model = haste.build_model("MMDiT")
    counts = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(counts.values()) == 512_415_504
    assert sum(x for n, x in counts.items() if not n.startswith("projectors")) == 505_070_608
    assert [n for n in counts if n.startswith("joint_blocks.23.context_block")] == [
        f"joint_blocks.23.context_block.{layer}.{kind}"
        for layer in ("attn.qkv", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    ]


def test_text_is_never_supervised_and_no_parameter_is_unused():
    torch.manual_seed(0)
    model, y = haste.MMDiT(**MMDIT), torch.randn(2, 5, 768)
    target = haste.Teacher(tiny_vit(), (8, 9, 10, 11), 4)(
        torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    )
    x0, eps = torch.randn(2, 2, 3, 8, 8)
    diff, _, atta = haste.losses(model, haste.Flow, x0, eps, torch.rand(2), y, target, 1, 1)
    atta.backward(retain_graph=True)
    text = [(int(n.split(".")[1]), p) for n, p in model.named_parameters() if ".context_block." in n]
    assert all(p.grad is None for block, p in text if block >= 7)
    assert all(p.grad is not None and p.grad.any() for block, p in text if block < 6)
    model.zero_grad()
    diff.backward()
    assert all(
        p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "projectors" not in n
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of one block whose words are single letters, in place of the real one."""
    transformers, folder = pytest.importorskip("transformers"), tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt").save_pretrained(folder)
    transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=768,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=12,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
        )
    ).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(haste, "CLIP", str(folder))
        patch.setitem(haste.CONFIGS, "MMDiT", haste.Config(3, 32, 4, (1,), 2, 16, (10,), 3))
        haste.load_clip.cache_clear()
        yield folder
    haste.load_clip.cache_clear()


def test_mmdit_prepares_coco_trains_through_tau_resumes_and_draws_captions(world, clip, tmp_path, capsys):
    images = [{"id": 7 * i, "file_name": f"{i:02d}.png"} for i in range(40)]
    captions = [{"image_id": 7 * i, "caption": f" image {i} {k} "} for i in range(40) for k in range(2)]
    coco = json.dumps({"images": images, "annotations": captions})
    (tmp_path / "coco.json").write_text(coco, "utf-8-sig")
    prepare(world / "images", tmp_path / "data", "--captions", tmp_path / "coco.json")
    data = haste.Data(tmp_path / "data")
    u = torch.tensor([0.05, 0.1, 0.54, 0.56, 0.999])
    chosen = haste.choose_captions(data, torch.tensor([0, 0, 0, 0, 39]), u, 0.1)
    first = data.captions[data.names[0]]
    assert chosen[:4] == ["", first[0], first[0], first[1]] and chosen[4] == data.captions[data.names[39]][1]
    more = "--data-dir", tmp_path / "data", "--model", "MMDiT"
    train(world, tmp_path / "a", *more, "--sampling-steps", 6)
    train(world, tmp_path / "b", *more, "--max-train-steps", 2)
    train(world, tmp_path / "b", *more)
    assert same(checkpoint(tmp_path / "a", 6)["model"], checkpoint(tmp_path / "b", 6)["model"])
    args = parse(f"--sample {tmp_path}/a/run/checkpoints/0000006.pt --num-steps 2 --out {tmp_path / 'x.png'}")
    args.captions = ["a red bus", "a cat"]
    haste.sample_from(args)
    assert "a red bus, a cat" in capsys.readouterr().out and (tmp_path / "x.png").exists()
    (tmp_path / "coco.json").write_text(coco.replace('"00.png"', '"none.png"'))
    with pytest.raises(UserError, match="lacks the captions of an image"):
        prepare(world / "images", tmp_path / "other", "--captions", tmp_path / "coco.json")


# ---- evaluate.py ----------------------------------------------------------------------------------------

SMALL = {"POOL": 24, "SPATIAL": 20, "LOGITS": 12}


class TinyInception(nn.Module):
    """Stands in for the Inception: 24, 20 and 12 features."""

    def __init__(self, weights=None):
        super().__init__()
        self.register_buffer("w", torch.randn(12, 56, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        x = F.adaptive_avg_pool2d(images.float() / 64, 2).flatten(1)
        return (x @ self.w).sin().split([24, 20, 12], dim=1)


@pytest.fixture
def tiny(monkeypatch):
    """TinyInception in place of the Inception, and one thread, which is faster at these sizes."""
    for name, value in {"Inception": TinyInception, **SMALL}.items():
        monkeypatch.setattr(evaluate, name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def judge_flags(*argv):
    return haste.parse("evaluate.py", evaluate.FLAGS, ["--num-workers", "0", *map(str, argv)])


def score(*argv):
    return evaluate.evaluate(judge_flags(*argv))


def pictures(n, seed=0, shape=(8, 8, 3)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def write_pngs(folder, arrays):
    for i, array in enumerate(arrays):
        evaluate.write_png(folder / f"{i:04d}.png", array)
    return folder


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


# ---- The network and the metrics ---------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (32, 32), (299, 299), (300, 64), (512, 299)])
def test_resize_is_tensorflow_1s_to_the_bit(height, width):
    x = pictures(1, shape=(height, width))[0].astype(np.float32)

    def grid(n):
        at = np.arange(299, dtype=np.float32) * np.float32(n / 299)
        low = np.floor(at)
        return low.astype(int), np.minimum(low + 1, n - 1).astype(int), at - low

    top, bottom, dy = grid(height)
    left, right, dx = grid(width)
    got = evaluate.tf1_resize(torch.from_numpy(x)[None, None])
    x = x[:, left] + (x[:, right] - x[:, left]) * dx
    x = x[top] + (x[bottom] - x[top]) * dy[:, None]
    assert np.array_equal(got[0, 0], x)


def naive_score(logits, split):
    scores = []
    for part in (logits[i : i + split] for i in range(0, len(logits), split)):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        divergence = (p * (np.log(p) - np.log(p.mean(0)))).sum(1)
        scores.append(math.exp(divergence.mean()))
    return np.mean(scores)


def naive_distance(x, y):
    """tr (S_1 S_2)^(1/2) of x (n, d), y (m, d) is the nuclear norm of X Y^T over sqrt((n - 1) (m - 1))."""
    apart = ((x.mean(0) - y.mean(0)) ** 2).sum()
    x = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    y = (y - y.mean(0)) / math.sqrt(len(y) - 1)
    return apart + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc")


def naive_precision(x, y):
    """The share of x that is no farther from one of y than that one's third neighbour in y is."""
    radii = [sorted(((a - b) ** 2).sum() for b in y)[3] for a in y]
    return np.mean([any(((a - b) ** 2).sum() <= r for b, r in zip(y, radii)) for a in x])


def naive_metrics(network, images, references):
    x, y = (
        [part.double().numpy() for part in network(torch.from_numpy(array).permute(0, 3, 1, 2))]
        for array in (images, references)
    )
    return {
        "fid": naive_distance(x[0], y[0]),
        "sfid": naive_distance(x[1], y[1]),
        "is": naive_score(x[2], evaluate.SPLIT),
        "precision": naive_precision(x[0], y[0]),
        "recall": naive_precision(y[0], x[0]),
    }


def compare(folder, x, y, *more):
    x = write_npz(folder / "x.npz", arr_0=x)
    y = write_npz(folder / "y.npz", arr_0=y)
    return score("--samples", x, "--ref", y, *more)


@torch.no_grad()
def test_metrics_are_those_of_torch_fidelitys_features(tmp_path, monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path, kept = tmp_path / "weights.pth", {}

    def randomise_and_save(net, randomise=evaluate.randomise):
        randomise(net)
        net.fc.weight.data /= 20  # so that no class has all of the probability
        torch.save(net.state_dict(), path)

    monkeypatch.setattr(evaluate, "randomise", randomise_and_save)
    evaluate.Inception("random")
    theirs = module.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    ).eval()
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda m, args, out: kept.update(out=out))

    def network(images):
        pool, logits = theirs(images)
        return pool, kept["out"][:, :7].permute(0, 2, 3, 1).flatten(1), logits

    smooth = pictures(16, 1, (2, 2, 3)).repeat(20, 1).repeat(20, 2)
    x = smooth[:8]
    y = smooth[8:] // 2 + pictures(8, 2, (40, 40, 3)) // 2
    got = compare(tmp_path, x, y, "--inception", path)
    assert got == pytest.approx(naive_metrics(network, x, y), rel=2e-6)
    assert got["is"] > 1.1


@pytest.mark.parametrize("n, m", [(200, 150), (12, 9), (9, 200)])
def test_frechet_distance_is_exact_also_without_full_rank(n, m):
    torch.manual_seed(0)
    x = torch.randn(n, 30).double()
    y = torch.randn(m, 30).double() @ torch.randn(30, 30).double() + 1
    got = evaluate.frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert got == pytest.approx(naive_distance(x.numpy(), y.numpy()), rel=1e-9)


@pytest.mark.parametrize("n", [60, 50, 20])
def test_metrics_are_those_of_the_formulas_in_full_fp32(tiny, tmp_path, monkeypatch, n):
    monkeypatch.setattr(evaluate, "SPLIT", 25)
    x, y = pictures(n), pictures(50, 1) // 2 + 60
    got = compare(tmp_path, x, y, "--batch-size", 7)
    assert got == pytest.approx(naive_metrics(TinyInception(), x, y), rel=1e-6)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


# ---- Images ------------------------------------------------------------------------------------------------


def test_npz_folder_and_prepared_dataset_give_the_same_figures(tiny, tmp_path, monkeypatch):
    images = pictures(30)
    ref = write_npz(tmp_path / "ref.npz", arr_0=pictures(40, 1))
    write_npz(tmp_path / "stored.npz", arr_0=images)
    np.savez_compressed(tmp_path / "packed.npz", labels=np.arange(30), arr_0=images)
    write_pngs(tmp_path / "tree" / "class", images)
    line = f"--prepare {tmp_path}/tree --data-dir {tmp_path}/data --vae none --resolution 8 --num-workers 0"
    haste.prepare(haste.parse("haste.py", haste.FLAGS, shlex.split(line)))
    read, sizes = zipfile.ZipExtFile.read, []
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: sizes.append(n) or read(self, n))
    names = ["stored.npz", "packed.npz", "tree", "data"]
    measured = [["--samples", tmp_path / name, "--ref", ref, "--batch-size", 8] for name in names]
    found = [score(*argv) for argv in measured]
    assert found[1:] == found[:1] * 3
    assert 0 <= min(sizes)
    assert max(sizes) <= 8 * 192  # a batch or a header, never the whole
    assert [score(*argv, "--num-workers", 2) for argv in measured[1:3]] == found[:2]


def test_folder_follows_links_and_names_what_it_leaves_out(tmp_path, capsys):
    folder = write_pngs(tmp_path / "samples" / "0", pictures(4)).parent
    os.symlink(write_pngs(tmp_path / "elsewhere", pictures(4, 1)), folder / "1")
    write_pngs(folder / ".cache", pictures(2, 2))
    (folder / "notes.txt").write_text("no image")
    images = evaluate.Folder(folder)
    assert torch.equal(images[range(4, 8)], torch.from_numpy(pictures(4, 1)).permute(0, 3, 1, 2))
    assert "1 files are no images and left out: notes.txt" in capsys.readouterr().out


def test_a_reference_that_make_ref_wrote_gives_the_same_figures(tiny, tmp_path, monkeypatch, capsys):
    real = write_pngs(tmp_path / "real", pictures(30))
    ref = tmp_path / "sub" / "ref.npz"
    samples = ["--samples", write_npz(tmp_path / "samples.npz", arr_0=pictures(35, 1))]
    score("--make-ref", real, "--out", ref)
    wanted = score(*samples, "--ref", real)
    assert score(*samples, "--ref", ref) == pytest.approx(wanted, rel=1e-9)
    made = dict(np.load(ref))
    assert np.array_equal(made.pop("arr_0"), pictures(30))
    statistics = score(*samples, "--ref", write_npz(tmp_path / "statistics.npz", **made))
    assert statistics == pytest.approx({key: wanted[key] for key in ("fid", "sfid", "is")}, rel=1e-9)
    assert "precision and recall are left out" in capsys.readouterr().out
    own = write_npz(tmp_path / "own.npz", arr_0=pictures(40, 6), **made)
    assert abs(score("--samples", own, "--ref", ref)["fid"]) < 1e-6  # as ADM takes them
    monkeypatch.setattr(evaluate, "MAX_REFERENCES", 4)  # of many images a few, from all over
    score("--make-ref", real, "--out", ref)
    assert np.array_equal(np.load(ref)["arr_0"], pictures(30)[[0, 10, 19, 29]])
    monkeypatch.setattr(evaluate.Npz, "__getitem__", None)  # arr_0 is not needed
    score("--samples", real, "--ref", ref, "--no-prec-recall")


def test_what_makes_a_fid_incomparable_is_printed_and_stored(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "SPLIT", 10)
    ref = write_npz(tmp_path / "ref.npz", arr_0=pictures(20))
    (tmp_path / "samples" / "class").mkdir(parents=True)
    for i, array in enumerate(pictures(12, 1, (8, 12, 3))):
        Image.fromarray(array).save(tmp_path / "samples" / "class" / f"{i}.JPG", "JPEG")
    argv = ["--samples", tmp_path / "samples", "--inception", "random", "--json", tmp_path / "j.json"]
    score(*argv, "--ref", ref)
    out = capsys.readouterr().out
    stored = json.loads((tmp_path / "j.json").read_text())["notes"]
    wanted = ["(8, 12)", "random", "not 50,000", "JPEG", "folder by folder"]
    for words, note in zip(wanted, stored, strict=True):
        assert words in note
        assert f"note: {note}\n" in out
    score("--samples", ref, "--ref", ref)
    assert capsys.readouterr().out.count("note: ") == 1


# ---- Samples of a checkpoint -------------------------------------------------------------------------------


def save_checkpoint(path, seed=0, **args):
    """A SiT-XS/4 with random weights for 8 x 8 pixels and 4 classes; "model" has others than "ema"."""
    torch.manual_seed(seed)
    ema, model = (haste.build_model("SiT-XS/4", input_size=8, in_channels=3, num_classes=4) for _ in range(2))
    for p in [*ema.parameters(), *model.parameters()]:
        nn.init.normal_(p, std=0.05)
    state = {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "steps": 2,
        "args": {"model": "SiT-XS/4", "vae": None, "scale": 1.0, "cfg_prob": 0.1} | args,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


@pytest.fixture
def drawing(tmp_path):
    """Flags that draw 20 samples of a checkpoint in 5 batches."""
    ref = write_npz(tmp_path / "ref.npz", arr_0=pictures(30))
    path = save_checkpoint(tmp_path / "run" / "checkpoints" / "0000002.pt")
    return ["--ckpt", path, "--ref", ref, *"--num-samples 20 --batch-size 4 --num-steps 3".split()]


@pytest.fixture
def drawn(monkeypatch):
    """The list of the first rows of the batches that are drawn."""
    draw, starts = evaluate.Samples.draw, []
    monkeypatch.setattr(
        evaluate.Samples, "draw", lambda self, rows: starts.append(rows.start) or draw(self, rows)
    )
    return starts


def read_folder(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_protocol_is_printed_and_stored(tiny, drawing, tmp_path, capsys):
    guided = "--mode heun --cfg-scale 1.5 --guidance-high 0.7 --inception random --balanced --seed 3"
    results = score(*drawing, *guided.split(), "--json", tmp_path / "out.json")
    folder = tmp_path / "run/eval/0000002-heun-3-cfg-1.5-in-0-0.7-seed-3-20-balanced"
    report, out = json.loads(Path(f"{folder}.json").read_text()), capsys.readouterr().out
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert list(results) == ["fid", "sfid", "is", "precision", "recall"]
    assert results.items() <= report.items()
    wanted = {
        "sampler": "heun",
        "steps": 3,
        "guidance": 1.5,
        "interval": [0.0, 0.7],
        "seed": 3,
        "batch size": 4,
        "number of samples": 20,
        "labels": "balanced",
        "arithmetic": "fp32",
        "features": "random",
        "samples": str(folder),
    }
    assert wanted.items() <= report["protocol"].items()
    for name, value in (results | report["protocol"]).items():
        assert f"{name:20} {value}\n" in out


def test_samples_are_the_emas_and_a_function_of_seed_and_batch(tiny, drawing):
    score(*drawing)
    samples = evaluate.Samples(judge_flags(*drawing, "--precision", "fp32"))
    weights = torch.load(samples.args.ckpt)["ema"]
    key = "final_layer.linear.weight"
    assert torch.equal(samples.model.state_dict()[key], weights[key])
    images = evaluate.Folder(samples.folder)
    assert torch.equal(images[range(8, 12)], samples.draw(range(8, 12)))
    samples.args.seed = 1
    assert not torch.equal(images[range(8, 12)], samples.draw(range(8, 12)))


def test_the_sde_does_not_draw_its_starting_noise_again(drawing, monkeypatch):
    samples, seen = evaluate.Samples(judge_flags(*drawing, "--precision", "fp32")), []
    monkeypatch.setattr(haste, "sample", lambda model, x, *more: seen.extend([x, torch.randn_like(x)]) or x)
    samples.draw(range(4))
    samples.draw(range(4, 8))
    assert (torch.corrcoef(torch.stack(seen).flatten(1)).abs() - torch.eye(4)).max() < 0.2


def test_only_missing_samples_are_drawn_and_the_figures_stay(tiny, drawing, drawn, tmp_path):
    whole = score(*drawing)
    (folder,) = (path for path in (tmp_path / "run" / "eval").iterdir() if path.is_dir())
    before = read_folder(folder)
    for name in ("000005.png", "000006.png", "000019.png"):
        (folder / name).unlink()
    (folder / "000007.png.part").write_bytes(b"what a killed process left")
    drawn.clear()
    for _ in range(2):  # the second time draws nothing
        assert score(*drawing) == whole
        assert drawn == [4, 16]
    assert read_folder(folder) == before
    assert score("--samples", folder, "--ref", tmp_path / "ref.npz", "--batch-size", 4) == whole


def test_samples_drawn_in_another_way_are_not_mixed(tiny, drawing, drawn, tmp_path):
    drawing += ["--out", tmp_path / "mine"]
    score(*drawing)
    before = read_folder(tmp_path / "mine")
    others = (
        "--seed=1 --num-steps=4 --cfg-scale=2 --guidance-high=.5 --mode=ode --balanced "
        "--precision=bf16 --batch-size=5 --num-samples=19"
    )
    for other in others.split():
        with pytest.raises(haste.UserError, match="not drawn as this command says"):
            score(*drawing, other)
    save_checkpoint(drawing[1], seed=1)
    with pytest.raises(haste.UserError, match="not drawn as this command says"):
        score(*drawing)
    assert read_folder(tmp_path / "mine") == before
    assert len(drawn) == 5


def test_two_processes_draw_and_measure_what_one_does(tiny, drawing, tmp_path):
    one = score(*drawing, "--num-samples", 42, "--out", tmp_path / "one")
    script = tmp_path / "tiny_evaluate.py"
    folders = [str(Path(path).parent) for path in (evaluate.__file__, __file__)]
    script.write_text(
        f"import sys; sys.path[:0] = {folders}\n"
        f"import evaluate, {Path(__file__).stem} as tests\n"
        f"vars(evaluate).update(tests.SMALL, Inception=tests.TinyInception)\n"
        f"evaluate.main()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = ["--num-samples", "42", "--out", tmp_path / "two", "--num-workers", "0"]
    done = subprocess.run(
        [*torchrun, script, *drawing, *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nrecall ") == 1
    two = json.loads((tmp_path / "two.json").read_text())
    assert {key: two[key] for key in one} == pytest.approx(one, rel=1e-9)
    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")


@pytest.mark.parametrize("more", [[], ["--balanced"]])
def test_labels_are_in_random_order_and_balanced_only_if_asked_for(drawing, more):
    y = evaluate.Samples(judge_flags(*drawing, "--num-samples", 4000, *more)).labels
    counts = np.bincount(y, minlength=4)
    assert (counts.tolist() == [1000] * 4) == bool(more)
    assert np.abs(counts - 1000).max() < 137  # five standard deviations, as below
    assert np.abs(np.bincount(4 * y[:-1] + y[1:], minlength=16) - 250).max() < 77


def test_latents_are_decoded_by_the_vae_that_the_protocol_names(tiny, drawing, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    vae = str(tmp_path / "vae")
    diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=3).save_pretrained(vae)
    save_checkpoint(drawing[1], vae=vae, scale=0.5)
    score(*drawing, "--num-samples", 4, "--out", tmp_path / "mine")
    assert json.loads((tmp_path / "mine.json").read_text())["protocol"]["VAE"] == vae


def test_an_mmdit_draws_the_first_captions_of_a_dataset(monkeypatch):
    texts = []
    mmdit = haste.build_model("MMDiT", input_size=8, hidden_size=48, depth=1)
    data = types.SimpleNamespace(names=["a", "b"], captions={"a": ["one", "two"], "b": ["three"]})
    monkeypatch.setattr(haste, "Data", lambda folder: data)
    monkeypatch.setattr(haste, "load_ema", lambda *_: (mmdit, {"vae": None, "scale": 1.0}))
    monkeypatch.setattr(haste, "encode_captions", lambda y: texts.append(y) or torch.ones(len(y), 2, 768))
    line = "--ckpt m.pt --captions-from D --num-samples 4 --cfg-scale 2 --num-steps 2 --precision fp32"
    evaluate.Samples(judge_flags(*line.split())).draw(range(4))
    assert texts[0] == [""]
    assert sorted(texts[1]) == ["one", "one", "three", "three"]


# ---- Mistakes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mess(tmp_path_factory):
    """A folder with good.npz, and with what a user might name in its place."""
    home = tmp_path_factory.mktemp("mess")
    images, eye = pictures(6), np.eye(2048)
    arrays = {
        "good": images,
        "float": images / 255,
        "nchw": images.transpose(0, 3, 1, 2),
        "three": images[:3],
    }
    for name, array in arrays.items():
        write_npz(home / f"{name}.npz", arr_0=array)
    write_npz(home / "pytorch_fid.npz", mu=eye[0], sigma=eye)
    (home / "cut.npz").write_bytes((home / "good.npz").read_bytes()[:-200])
    (home / "empty").mkdir()
    write_pngs(home / "mixed", [*images, *pictures(1, shape=(9, 8, 3))])
    torn = write_pngs(home / "torn", images) / "0003.png"
    torn.write_bytes(torn.read_bytes()[:99])
    torch.save({"w": torch.zeros(3)}, home / "vit.pth")
    save_checkpoint(home / "run.pt")
    save_checkpoint(home / "no_null.pt", cfg_prob=0)
    return home


def refused(mess, monkeypatch, line, sentence):
    monkeypatch.chdir(mess)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--num-workers", "0", *line.split()])
    said = str(stop.value.code)
    assert said.startswith("evaluate.py: ") and "\n" not in said
    assert sentence in said


@pytest.mark.parametrize(
    "path, sentence",
    {
        "nothing.npz": "nothing.npz",
        "float.npz": "float64",
        "nchw.npz": "(6, 3, 8, 8)",
        "three.npz": "holds 3 images",
        "cut.npz": "cut.npz",
        "empty": "no images",
        "mixed": "0006.png has the size [9, 8], and 0000.png [8, 8]",
        "torn": "0003.png cannot be read",
    }.items(),
)
def test_bad_images_are_told_before_any_sample_is_drawn(tiny, mess, drawn, monkeypatch, path, sentence):
    refused(mess, monkeypatch, f"--samples {path} --ref good.npz", sentence)
    refused(mess, monkeypatch, f"--make-ref {path} --out ref.npz", sentence)
    refused(mess, monkeypatch, f"--ckpt run.pt --ref {path} --num-samples 20", sentence)
    if path == "torn":  # in a loader process
        refused(mess, monkeypatch, "--samples torn --ref good.npz --num-workers 1", sentence)
    assert not drawn
    assert not (mess / "ref.npz").exists()


@pytest.mark.parametrize(
    "line, sentence",
    {
        "--samples good.npz --ref pytorch_fid.npz": "pytorch-fid and clean-fid",
        "--samples good.npz": "need --ref",
        "--ref good.npz": "use one of --ckpt",
        "--samples good.npz --ref good.npz --inception vit.pth": "the FID Inception's weights",
        "--ckpt vit.pth --ref good.npz": "vit.pth",
        "--ckpt run.pt --ref good.npz --captions-from .": "is for an MMDiT",
        "--ckpt run.pt --ref good.npz --num-samples 4 --mode ddpm": "no sampler ddpm",
        "--ckpt run.pt --ref good.npz --num-samples 4 --out good.npz/below": "good.npz",
        "--ckpt no_null.pt --ref good.npz --num-samples 4 --cfg-scale 1.5": "without label dropout",
    }.items(),
)
def test_a_mistake_in_the_flags_gets_a_sentence(mess, monkeypatch, line, sentence):
    if "--inception" not in line:
        monkeypatch.setattr(evaluate, "Inception", TinyInception)
    if "--num-samples" in line:
        for name, value in SMALL.items():
            monkeypatch.setattr(evaluate, name, value)
    refused(mess, monkeypatch, line, sentence)


# ---- Demo, bench, comparison -------------------------------------------------------------------------------


@pytest.fixture
def hasty(tiny, monkeypatch, tmp_path):
    """Two steps of fitting, few letters and two steps of each sampler."""
    letters, fit = evaluate.draw_letters, evaluate.fit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "draw_letters", lambda n, seed: letters(1100 if seed == 2 else 100, seed))
    monkeypatch.setattr(evaluate, "fit", lambda net, loss, data, steps: fit(net, loss, data, 2))
    monkeypatch.setattr(evaluate, "DRAWING", "--num-steps 2 --cfg-scale 2")
    monkeypatch.setattr(evaluate, "MEASURED", "--num-samples 10 --mode heun --num-steps 2 --num-workers 0")
    return "--demo --tau 1 --max-train-steps 2 --checkpointing-steps 1 --sampling-steps 0".split()


def test_the_demo_is_a_row_of_ordinary_commands(hasty, tmp_path, capsys):
    assert not evaluate.demo(hasty)
    out, home = capsys.readouterr().out, tmp_path / "runs" / "demo"
    programs = [line.split()[2] for line in out.splitlines() if line.startswith("$ python ")]
    assert programs == ["haste.py", "haste.py", "evaluate.py", "evaluate.py", "haste.py"]
    assert out.count("the classifier reads") == 3
    phases = [json.loads(line)["phase"] for line in (home / "metrics.jsonl").open()]
    assert phases == [1, 2]
    assert Image.open(home / "demo.png").height >= 3 * 48


def test_the_benchs_plain_network_is_the_models():
    model = haste.build_model("SiT-XS/4", input_size=8)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 999])
    assert torch.allclose(evaluate.Plain(model)(x, t, y), model(x, t, y), atol=1e-6)


def test_the_bench_reports_times_rates_and_ratios(tiny, tmp_path, monkeypatch):
    vit = evaluate.VisionTransformer(
        img_size=16, embed_dim=24, depth=12, num_heads=2, patch_size=4, num_classes=0
    )
    monkeypatch.setattr(haste, "load_teacher", lambda name, grid, blocks: haste.Teacher(vit, blocks, grid))
    line = f"--bench --model SiT-XS/2 --resolution 64 --batch-size 2 --json {tmp_path}/bench.json"
    evaluate.bench(haste.parse("haste.py", haste.FLAGS, line.split()))
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = report["rows"]
    assert list(rows) == ["plain", "phase I", "phase II", "sampling"]
    assert report["phase2_over_plain"] == rows["phase II"]["over_plain"]
    assert 0 < report["phase1_over_expected"] < rows["phase I"]["over_plain"]


def test_the_comparison_trains_and_measures_each_variant_once(hasty, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "VARIANTS", {"plain": "--tau 0", "HASTE": ""})
    trained, train = [], haste.train
    monkeypatch.setattr(haste, "train", lambda args: trained.append(args.exp_name) or train(args))
    evaluate.demo([*hasty, "--compare"])
    evaluate.demo([*hasty, "--compare", "--seeds", "2"])
    assert trained == [f"compare/seed{seed}/{name}" for seed in (0, 1) for name in ("plain", "HASTE")]
    home = tmp_path / "runs" / "compare"
    runs = json.loads((home / "compare.json").read_text())["runs"]
    x = [runs["plain"][seed]["1"][0] for seed in "01"]
    assert f"| 1 | {np.mean(x):.2f} ± {np.std(x, ddof=1):.2f}, " in capsys.readouterr().out
    assert (home / "compare.png").is_file() == bool(importlib.util.find_spec("matplotlib"))
    with pytest.raises(haste.UserError, match="other flags"):
        evaluate.demo([*hasty, "--compare", "--learning-rate", "0.1"])


# ---- Slow: python -m pytest -m slow ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills", [(0, 12), (2, 6)])
def test_killed_at_random_instants_the_end_is_the_same_bits(world, tmp_path, processes, kills):
    rng, more = np.random.default_rng(0), ("--max-train-steps", 60, "--tau", 30, "--checkpointing-steps", 5)
    assert launch(line(world, tmp_path / "whole", *more), processes).wait(300) == 0
    for _ in range(kills):
        process = launch(line(world, tmp_path / "killed", *more), processes, start_new_session=True)
        time.sleep(rng.uniform(4, 12))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert launch(line(world, tmp_path / "killed", *more), processes).wait(300) == 0
    assert same(checkpoint(tmp_path / "whole", 60), checkpoint(tmp_path / "killed", 60))


@pytest.mark.slow
def test_memory_and_open_files_do_not_grow(world, tmp_path):
    more = "--max-train-steps", 3000, "--checkpointing-steps", 500, "--num-workers", 1, "--tau", 1500
    process, seen = launch(line(world, tmp_path, *more), stderr=subprocess.DEVNULL), []
    while process.poll() is None:
        time.sleep(1)
        status = Path(f"/proc/{process.pid}/status")
        if (tmp_path / "run/metrics.jsonl").exists() and status.exists():
            memory = int(status.read_text().split("VmRSS:")[1].split()[0])
            seen.append((memory, len(os.listdir(f"/proc/{process.pid}/fd"))))
    (early, files), (late, files_late) = np.median(seen[5:15], axis=0), np.median(seen[-10:], axis=0)
    assert process.returncode == 0 and late < 1.1 * early and files_late < files + 20
