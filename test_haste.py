# SPDX-License-Identifier: MIT
"""What haste.py and evaluate.py promise, in the order of the files. Run: python -m pytest -q

To add a test, copy one. Most need one of three things, which stand under the first banner:
- tiny_model() is a SiT with the sizes of TINY; frozen(seed, ...) are numbers that are the same everywhere;
- the fixture `world` is a prepared dataset and a teacher; train(world, folder, "--flag", value) is a run of
  six steps on it, three in each phase; checkpoint(folder, step) and metrics(folder, key) read what it wrote;
- complaint("--flag", value) is the sentence with which the command line ends.
Fixtures replace what cannot be downloaded: tiny the Inception, clip CLIP, StubVAE the VAE.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
import zipfile
from contextlib import suppress
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
VIT = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 12, "num_heads": 2, "num_classes": 0}


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

def tiny_vit(**sizes):
    torch.manual_seed(0)
    return VisionTransformer(**VIT | {"dynamic_img_size": True} | sizes)

def save_teacher(path, **sizes):
    """Writes a file for --teacher."""
    config = VIT | sizes
    torch.save({"config": config, "model": tiny_vit(**config).state_dict()}, path)
    return str(path)

def bytes_of(n, seed=0, size=(8, 8)):
    """n images, uint8 (n, H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (n, *size, 3), np.uint8)

def tensor_of(arrays):
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)

def write_pngs(folder, arrays):
    """Writes 0000.png, 0001.png, ... and returns the folder."""
    for i, array in enumerate(arrays):
        evaluate.write_png(folder / f"{i:04d}.png", array)
    return folder

def save_images(folder, n=40, classes=4):
    """Writes n images of 9 x 12 into the folders class0, class1, ... in turn."""
    for i, array in enumerate(bytes_of(n, 0, (9, 12))):
        evaluate.write_png(folder / f"class{i % classes}/{i:02d}.png", array)

def frozen(seed, *shape):
    """Normal numbers that numpy gives on every machine."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))

def with_frozen_weights(model, without="nothing"):
    """Gives each weight, in the order of names, numbers of its own, scaled by its inputs."""
    state = model.state_dict()
    for i, name in enumerate(sorted(n for n in state if not n.startswith(without))):
        if name != "pos_embed":
            width = state[name][0].numel() if state[name].ndim > 1 else 2500
            state[name] = frozen(1000 + i, *state[name].shape) * width**-0.5
    model.load_state_dict(state)
    return model

def freeze_noise(monkeypatch):
    """Makes each call of torch.randn_like return the next frozen numbers."""
    seeds = iter(range(501, 600))
    monkeypatch.setattr(torch, "randn_like", lambda x: frozen(next(seeds), *x.shape).to(x.dtype))

def near(value, rel=2e-4):
    """What fp32 gives on another machine."""
    return pytest.approx(value, rel=rel, abs=2e-5)

def assert_gradient_norms(model, wanted):
    named = dict(model.named_parameters())
    assert {name: named[name].grad.norm().item() for name in wanted} == near(wanted)

def record_calls(monkeypatch, owner, name):
    """The list to which each call of owner.name will add its arguments."""
    calls, real = [], getattr(owner, name)

    def record(*given, **more):
        calls.append(given)
        return real(*given, **more)

    monkeypatch.setattr(owner, name, record)
    return calls

def count_parameters(name):
    """The named parameters of a model, and how many there are without the projector's."""
    with torch.device("meta"):
        model = haste.build_model(name)
    named = dict(model.named_parameters())
    return named, sum(p.numel() for n, p in named.items() if not n.startswith("projectors"))

def parse(line, *more):
    """The values of haste.py's flags."""
    return haste.parse_args([*line.split(), *map(str, more)])

def prepare(source, out, *more):
    """Prepares images as pixels of 8 x 8."""
    line = f"--prepare {source} --data-dir {out} --resolution 8 --vae none --num-workers 0"
    haste.prepare(parse(line, *more))
    return haste.Data(out)

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """40 small images in 4 classes, prepared as pixels of 8 x 8, and a teacher of 12 blocks."""
    home = tmp_path_factory.mktemp("world")
    save_images(home / "images")
    prepare(home / "images", home / "data")
    save_teacher(home / "teacher.pt")
    return home

def line(world, out, *more):
    """The arguments of a run of 6 steps, 3 in each phase."""
    flags = (
        f"--model SiT-XS/2 --data-dir {world}/data --teacher {world}/teacher.pt --output-dir {out} "
        "--exp-name run --batch-size 8 --max-train-steps 6 --tau 3 --checkpointing-steps 2 --log-every 1 "
        "--sampling-steps 0 --num-workers 0 --learning-rate 1e-3 --num-steps 2"
    )
    return [*flags.split(), *map(str, more)]

def train(world, out, *more):
    """A run of 6 steps in this process; later flags replace those of `line`. Returns the exit code."""
    return haste.train(parse("", *line(world, out, *more)))

def checkpoints(out):
    return sorted(path.name for path in Path(out, "run/checkpoints").iterdir())

def checkpoint(out, step):
    return haste.read_checkpoint(Path(out, f"run/checkpoints/{step:07d}.pt"), "SiT-XS/2")

def metrics(out, key=None):
    """The lines of metrics.jsonl, or one value of those that have it."""
    lines = [json.loads(line) for line in Path(out, "run/metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line] if key else lines

def same(a, b):
    """True if two nests of dictionaries and tensors agree to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "args")
    return a == b

def distance(out, other):
    """The largest difference between the weights that two runs end with."""
    a, b = (checkpoint(path, 6)["model"] for path in (out, other))
    return max((a[k] - b[k]).abs().max().item() for k in a)

def complaint(*argv, program=haste):
    """The sentence that the command line ends with."""
    with pytest.raises(SystemExit) as stop:
        program.main([*map(str, argv)])
    sentence = str(stop.value)
    assert sentence.startswith(f"{program.__name__}.py: ") and "\n" not in sentence
    return sentence


# ---- 1. The student ----------------------------------------------------------------------------------------

def test_released_code_gives_the_same_figures(monkeypatch):
    """Forward, losses, gradients and samplers of the authors' code, run on numpy's frozen streams."""
    model = haste.SiT(hidden_size=192, depth=10, num_classes=10, teacher_dim=48, projector_dim=96)
    with_frozen_weights(model)
    x, eps = frozen(1, 2, 4, 32, 32), frozen(2, 2, 4, 32, 32)
    t, y = torch.tensor([0.3, 0.8]), torch.tensor([3, 7])
    maps = [(frozen(40 + i, 2, 12, 256, 64), frozen(60 + i, 2, 12, 256, 64)) for i in range(4)]
    diff, repa, atta = haste.losses(
        model, haste.Flow(), x, eps, t, y, (frozen(3, 2, 256, 48), maps), 1, 1
    )
    assert [diff.item(), repa.item(), atta.item()] == near([3.124647, -0.002397, 5.951766])
    (diff + 0.5 * repa + 0.5 * atta).backward()
    norms = {
        "blocks.4.attn.qkv.weight": 0.640134,
        "blocks.7.attn.qkv.weight": 0.495325,
        "x_embedder.proj.weight": 0.376411,
        "projectors.0.0.weight": 0.047125,
        "final_layer.linear.weight": 2.75373,
    }
    assert_gradient_norms(model, norms)
    for mode, values, mean in (
        ("ode", [-0.570364, 2.528501, 2.473564, 0.119391], 1.093669),
        ("heun", [-0.494683, 2.502542, 2.412591, 0.107579], 1.086206),
        ("sde", [0.613797, 1.507382, 0.466727, 0.038904], 0.921484),
    ):
        freeze_noise(monkeypatch)
        out = haste.sample(model, frozen(9, 2, 4, 32, 32), y, 6, 1.8, (0.0, 0.7), mode)
        assert out[1, :, 20, 3].tolist() == near(values)
        assert out.abs().mean().item() == near(mean)

def test_parameters_are_those_of_sit_and_repa():
    named, count = count_parameters("SiT-XL/2")
    # SiT publishes its XL/2 with twice the output channels
    assert count == 675_129_632 - 16 * (1152 + 1)
    parts = "pos_embed x_embedder t_embedder y_embedder blocks projectors final_layer"
    assert list(dict.fromkeys(name.split(".")[0] for name in named)) == parts.split()
    assert not named["pos_embed"].requires_grad

def test_new_model_gives_zero_velocity_and_blocks_are_the_identity():
    model, tokens = tiny_model(), torch.randn(2, 16, 32)
    assert not model(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1])).any()
    assert torch.equal(model.blocks[0](tokens, torch.randn(2, 32))[0], tokens)

def test_initial_weights_do_not_depend_on_the_teachers_width():
    a, b = (tiny_model(teacher_dim=width).state_dict() for width in (24, 48))
    assert all(torch.equal(a[k], b[k]) for k in a if not k.startswith("projectors"))

def test_align_returns_projected_tokens_and_the_maps_that_attention_used(monkeypatch):
    model, tokens = awake(tiny_model()), []
    used = record_calls(monkeypatch, F, "scaled_dot_product_attention")     # of q, k, v
    model.blocks[2].register_forward_hook(lambda m, args, out: tokens.append(out[0]))
    given = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 4])
    v, z, qk = model(*given, align=True)
    for pair, qkv in zip(qk, used[1:3], strict=True):
        assert all(map(torch.equal, pair, qkv))
    assert torch.equal(z, model.projectors[0](tokens[0]))
    assert torch.equal(v, model(*given))

def test_queries_and_keys_are_views():
    qkv = torch.randn(2, 5, 24)
    pointers = {x.untyped_storage().data_ptr() for x in haste.split_heads(qkv, 2)}
    assert pointers == {qkv.untyped_storage().data_ptr()}


# ---- 2. The teacher ----------------------------------------------------------------------------------------

class Dino(VisionTransformer):
    """Speaks as the hub's DINOv2 does: no resampling, registers behind the class token, a dictionary."""

    def __init__(self, registers):
        super().__init__(**VIT | {"img_size": 21, "patch_size": 3})
        self.registers = nn.Parameter(torch.randn(1, registers, 24))
        self.patch_embed.strict_img_size = False

    def forward_features(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1)
        x = x + self.pos_embed
        x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return {"x_norm_patchtokens": self.norm(x)[:, 1 + self.registers.shape[1] :]}

@pytest.mark.parametrize("kind", ["dinov2_vitb14", "dinov2_vitb14_reg", "file"])
def test_teacher_returns_features_and_maps_of_the_patches(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "load", lambda repo, name, **how: Dino(4 * name.endswith("reg")))
    name = save_teacher(tmp_path / kind, img_size=14) if kind == "file" else kind
    teacher = haste.load_teacher(name, 4, (7, 9, 11))
    used, last = record_calls(monkeypatch, F, "scaled_dot_product_attention"), []
    teacher.vit.norm.register_forward_hook(lambda m, args, out: last.append(out))
    features, qk = teacher(tensor_of(bytes_of(2, 0, (20, 20))))
    assert torch.equal(features, last[0][:, -16:])
    for b, pair in zip((7, 9, 11), qk, strict=True):  # without class and register tokens
        assert all(torch.equal(x, all_tokens[:, :, -16:]) for x, all_tokens in zip(pair, used[b]))
    assert not teacher.vit.training and not any(p.requires_grad for p in teacher.parameters())

def test_teacher_sees_the_image_normalised_and_bicubic_on_the_students_grid():
    teacher, seen = haste.Teacher(tiny_vit(img_size=12), (), 6), []
    teacher.vit.patch_embed.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    images = tensor_of(bytes_of(2, 0, (16, 16)))
    teacher(images)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    wanted = F.interpolate((images / 255 - mean) / std, 12, mode="bicubic")
    assert torch.allclose(seen[0], wanted, atol=1e-5)

def test_teacher_blocks_keep_their_distance_from_the_last(tmp_path):
    for depth, blocks in ((12, [7, 9, 11]), (24, [19, 21, 23])):
        path = save_teacher(tmp_path / "teacher.pt", depth=depth)
        assert haste.load_teacher(path, 4, (7, 9, 11)).blocks == blocks
    with pytest.raises(UserError, match="could not be loaded"):
        haste.load_teacher(save_teacher(tmp_path / "teacher.pt", depth=4), 4, (7, 9, 11))


# ---- 3, 4, 5. Samplers, losses, the trigger ----------------------------------------------------------------

class GaussianVelocity(nn.Module):
    """The exact velocity of data from N(0, 1/4): E[eps - x0 | x_t]."""

    diffusion, can_be_guided, guided_channels = haste.Flow(), True, 4

    def __init__(self):
        super().__init__()
        self.calls = []

    def null_condition(self, y):
        return torch.full_like(y, 3)

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item(), y.tolist()))
        s = t.view(-1, 1, 1, 1).double()
        return ((s - (1 - s) / 4) / ((1 - s) ** 2 / 4 + s**2) * x).to(x.dtype)

def noise_and_labels(channels, side):
    return frozen(0, 4, channels, side, side), torch.zeros(4).long()

def test_samplers_turn_noise_into_data():
    noise, y = noise_and_labels(1, 32)
    ode = haste.sample(GaussianVelocity(), noise, y, steps=100, mode="ode")
    heun = haste.sample(GaussianVelocity(), noise, y, steps=100, mode="heun")
    exact = 0.5 * noise.double()  # the flow of a Gaussian is a scaling
    assert (ode - exact).abs().max() < 0.05 and (heun - exact).abs().max() < 0.003
    torch.manual_seed(0)
    sde = haste.sample(GaussianVelocity(), noise, y)
    assert sde.std().item() == pytest.approx(0.5, abs=0.02) and sde.dtype == torch.float64
    assert torch.corrcoef(torch.stack([sde.flatten(), noise.flatten()]))[0, 1] < 0.5
    with pytest.raises(UserError, match="no sampler ddpm"):
        haste.sample(GaussianVelocity(), noise, y, mode="ddpm")

@pytest.mark.parametrize("mode, evaluations", [("sde", 6), ("ode", 6), ("heun", 11)])
def test_guidance_doubles_the_batch_only_inside_its_interval(mode, evaluations):
    model = GaussianVelocity()
    haste.sample(model, torch.randn(2, 1, 2, 2), torch.tensor([0, 2]), 6, 2.0, (0.3, 0.7), mode)
    assert len(model.calls) == evaluations
    first = model.calls[::2] if mode == "heun" else model.calls
    for n, t, labels in first:
        assert (n, labels) == ((4, [0, 2, 3, 3]) if 0.3 <= t <= 0.7 else (2, [0, 2]))
    if mode == "heun":  # its second evaluation keeps the decision of its first
        assert all(a[0] == b[0] for a, b in zip(first, model.calls[1::2]))

def test_paper_protocol_takes_250_evaluations_from_1_to_004():
    model = GaussianVelocity()
    haste.sample(model, torch.randn(1, 1, 2, 2), torch.tensor([0]))
    assert [t for _, t, _ in model.calls] == pytest.approx(np.linspace(1, 0.04, 250).tolist())

def test_feature_loss_is_the_mean_negative_cosine():
    z, y = torch.randn(2, 6, 5)
    naive = -sum(a @ b / a.norm() / b.norm() for a, b in zip(z, y)) / 6
    assert haste.feature_loss(z.view(2, 3, 5), y.view(2, 3, 5)).item() == pytest.approx(naive.item())
    # in fp16, this would overflow
    assert haste.feature_loss(1e4 * z.half(), z).item() == pytest.approx(-1, abs=1e-3)

def attention_maps(q, k):
    """softmax(q k^T / sqrt(d)) of each head, in fp64."""
    return (q.double() @ k.double().mT / math.sqrt(q.shape[3])).softmax(-1).unbind(1)

def naive_attention_loss(student, teacher):
    """Map by map, in fp64."""
    total = []
    for student_qk, teacher_qk in zip(student, teacher):
        pairs = zip(attention_maps(*student_qk), attention_maps(*teacher_qk))
        total += [-(a_t * a.log()).sum(-1).mean() for a, a_t in list(pairs)[:12]]
    return sum(total) / len(total)

@pytest.mark.parametrize(
    "heads, teacher_heads, N", [(6, 12, 5), (12, 12, 800), (16, 12, 5), (4, 2, 5)]
)
def test_attention_loss_is_the_mean_cross_entropy_of_paired_heads(heads, teacher_heads, N):
    """800 tokens come in several pieces."""
    torch.manual_seed(0)
    student = [tuple(torch.randn(2, 2, heads, N, 6, requires_grad=True)) for _ in range(2)]
    teacher = [tuple(torch.randn(2, 2, teacher_heads, N, 4)) for _ in range(2)]
    loss, naive = haste.attention_loss(student, teacher), naive_attention_loss(student, teacher)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    inputs = [x for pair in student for x in pair]
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(naive, inputs)):
        assert torch.allclose(a, b, atol=1e-6)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_loss_is_finite_at_logit_gaps_past_100(dtype):
    q = torch.full((1, 1, 2, 1), 300, dtype=dtype, requires_grad=True)
    k = torch.tensor([1, 0], dtype=dtype).view(1, 1, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = haste.attention_loss([(q, k)], [(q.detach(), k.flip(2))])
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 300
    assert q.grad.isfinite().all()

@torch.no_grad()
def test_diffusion_loss_by_hand_and_terms_of_weight_0_left_out():
    model, y, t = awake(tiny_model()), torch.tensor([1, 2]), torch.tensor([0.25, 0.75])
    x0, eps = torch.randn(2, 2, 3, 8, 8)
    given = model, haste.Flow(), x0, eps, t, y
    s = t.view(2, 1, 1, 1)
    naive = (model((1 - s) * x0 + s * eps, t, y) - eps + x0).square().mean()
    target = haste.Teacher(tiny_vit(), (1, 2), 4)(tensor_of(bytes_of(2)))
    _, repa, atta = haste.losses(*given, target, 1, 1)
    assert repa and atta
    for with_target, lambda_r, lambda_a, wanted in (
        (None, 1, 1, [naive, 0, 0]),
        (target, 0, 1, [naive, 0, atta]),
        (target, 1, 0, [naive, repa, 0]),
    ):
        got = haste.losses(*given, with_target, lambda_r, lambda_a)
        assert [float(x) for x in got] == pytest.approx([float(x) for x in wanted])

class OneWeight(nn.Module):
    """v = w everywhere, z = (w, 1): with features (1, 0), alignment wants a larger w, L_diff w = eps - x0."""

    diffusion, feature_block = haste.Flow(), 1

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False)])
        nn.init.ones_(self.blocks[0].weight)

    def forward(self, x, t, y, align=False):
        w = self.blocks[0].weight.view(())
        return w.expand_as(x), torch.stack([w, torch.ones(())]).expand(len(x), 1, 2), []

@pytest.mark.parametrize("wish, cosine", [(2.0, 1.0), (0.0, -1.0)])
def test_gradients_of_alignment_and_denoising(wish, cosine):
    target, x0 = (torch.tensor([1.0, 0.0]).expand(3, 1, 2), []), torch.zeros(3, 1, 2, 2)
    align, denoise = haste.gradients(
        OneWeight(), 0.5, x0, x0 + wish, torch.zeros(3).long(), target, 0.5, 0
    )
    assert F.cosine_similarity(align, denoise, dim=0).item() == pytest.approx(cosine)
    assert denoise.item() == pytest.approx(2 * (1 - wish))

def test_trigger_averages_gradients_over_images_and_runs_the_teacher_once_each(world, monkeypatch):
    data, seen = haste.Data(world / "data"), []
    data.with_images = True

    def gradients(*given):  # by parts: the mean of cosines would be 0, that of gradients decides
        return torch.tensor([[1.0], [1.0 if len(seen) == 1 else -9.0]])

    monkeypatch.setattr(haste, "gradients", gradients)
    args = parse("--tau-images 10")
    cosines = haste.measure_cosines(None, lambda images: seen.append(len(images)), data, args, 0, 5)
    assert cosines == [-1.0] * 4 and seen == [5, 5]


# ---- 6. Data -----------------------------------------------------------------------------------------------

def test_order_is_one_permutation_after_another_on_any_number_of_processes():
    def stream(rows):
        return list(haste.batch_indices(10, 3, 6, rows, range(5)))

    whole = sum(stream(slice(0, 6)), [])
    first, second = whole[:10], whole[10:20]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    halves = zip(stream(slice(0, 3)), stream(slice(3, 6)))
    assert sum((a + b for a, b in halves), []) == whole

def test_noise_is_a_function_of_seed_and_step():
    t, u, eps, xi = a = haste.randomness(8, (1, 2, 2), 0, 5)
    assert all(map(torch.equal, a, haste.randomness(8, (1, 2, 2), 0, 5)))
    assert not any(map(torch.equal, a, haste.randomness(8, (1, 2, 2), 0, 6)))
    assert 0 <= t.min() and t.max() < 1 and not torch.equal(eps, xi)

def test_crop_is_adms():
    image = Image.fromarray(bytes_of(1, 0, (64, 96))[0])
    halved_twice = image.resize((48, 32), Image.BOX).resize((24, 16), Image.BOX)
    wanted = np.asarray(halved_twice.resize((22, 15), Image.BICUBIC))
    assert np.array_equal(haste.center_crop(image, 15), wanted[:, 3:18])

@pytest.mark.parametrize("damaged", [False, True])
def test_exif_orientation_is_heeded_even_beside_damaged_tags(damaged):
    image = Image.fromarray(bytes_of(1, 0, (2, 4))[0])
    image.getexif()[0x0112] = 6
    if damaged:
        image.getexif()[0x011A] = "not a number"
        image.info["exif"] = b"rubbish"
    assert haste.to_rgb(image).size == (2, 4)

def test_grey_images_of_16_bits_keep_their_levels():
    image = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert np.asarray(haste.to_rgb(image))[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]

def test_prepare_writes_repas_layout_and_names_what_it_leaves_out(tmp_path, capsys):
    source = tmp_path / "source"
    save_images(source, 8)
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        save_images(source / hidden, 4)
    for name in ("class0/._00.png", "class1/broken.png", "class1/clip.gif"):
        (source / name).write_bytes(b"no image")
    (tmp_path / "elsewhere").mkdir()
    Image.new("L", (20, 9)).save(tmp_path / "elsewhere" / "b.TIF")
    (source / "class3" / "link").symlink_to(tmp_path / "elsewhere")
    (source / "class3" / "circle").symlink_to(source / "class3")
    data = prepare(source, tmp_path / "data")
    printed = "".join(capsys.readouterr())
    assert data.classes == ["class0", "class1", "class2", "class3"]
    assert np.bincount(data.labels).tolist() == [2, 2, 2, 3]
    assert data.names[0] == "00000/img00000000.png"
    for words in ("class1/broken.png", "1 damaged", "clip.gif", "class0, class1"):
        assert words in printed

@pytest.mark.parametrize(
    "files, words",
    [
        (["a.png"], "put a flat folder into one"),
        (["train/a/a.png", "val/a/a.png"], "folder of images"),
        (["class0/a.png", "class1/notes.txt"], "empty: class1"),
        ([], "folder of images"),
    ],
)
def test_prepare_refuses_trees_without_classes(tmp_path, files, words):
    for name in files:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(b"")
    with pytest.raises(UserError, match=words):
        prepare(tmp_path / "tree", tmp_path / "data")

def test_interrupted_prepare_resumes_and_ends_the_same(world, tmp_path, monkeypatch):
    real, calls = haste.write_crops, []

    def dying(*given):
        calls.append(given[-1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(haste, "write_crops", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(world / "images", tmp_path / "data")
    with pytest.raises(UserError, match="no dataset"):
        haste.Data(tmp_path / "data")
    a, b = prepare(world / "images", tmp_path / "data"), haste.Data(world / "data")
    assert len(calls[2]) == 8  # only what was missing
    assert all(torch.equal(a[i]["image"], b[i]["image"]) for i in range(40))
    with pytest.raises(UserError, match="begun differently"):
        prepare(world / "images", tmp_path / "data", "--resolution", 16)

class StubVAE(nn.Module):
    """Latents are every second pixel; std is 0.1."""

    config = types.SimpleNamespace(scaling_factor=0.5)

    def encode(self, x):
        mean = x[:, :, ::2, ::2]
        latent = types.SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.1))
        return types.SimpleNamespace(latent_dist=latent)

@pytest.fixture(scope="module")
def latents(world):
    """The world's images, prepared with a VAE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(haste, "load_vae", lambda name: StubVAE())
        prepare(world / "images", world / "latents", "--vae", "stub")
    return world / "latents"

def test_latents_are_mean_and_std_and_x0_is_drawn_from_them(latents):
    data = haste.Data(latents)
    batch = haste.default_collate([data[i] for i in range(4)])
    assert "image" not in batch and batch["moments"].shape == (4, 6, 4, 4) and data.shape == (3, 4, 4)
    xi, mean = torch.randn(4, 3, 4, 4), batch["moments"][:, :3]
    assert torch.allclose(data.x0(batch, xi), 0.5 * (mean + 0.1 * xi), atol=1e-6)
    data.with_images = True
    mean = data[0]["image"][:, ::2, ::2] / 127.5 - 1
    assert torch.allclose(mean, data[0]["moments"][:3], atol=1e-6)

def repa_folder(folder, labels, channels=4):
    """Writes a dataset as REPA's preprocessing does, of 12 latents."""
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(12)]
    (folder / "vae-sd/00000").mkdir(parents=True)
    for name in names:
        np.save(folder / "vae-sd" / name, np.ones((2 * channels, 8, 8), np.float32))
    listing = {"labels": labels and list(zip(names, labels))}
    (folder / "vae-sd/dataset.json").write_text(json.dumps(listing), "utf-8-sig")

def test_repas_dataset_trains_as_it_is(world, tmp_path):
    repa_folder(tmp_path, [0, "7", 2.0, 1] * 3)
    data = haste.Data(tmp_path)
    assert (data.vae, data.scale, len(data.classes)) == (haste.VAE_ENCODER, 0.18215, 8)
    assert train(world, tmp_path, "--data-dir", tmp_path, "--tau", 0) == 0

@pytest.mark.parametrize(
    "labels, channels, words",
    [
        ([0, None], 4, "img-mean-std-00000001"),
        ([0, 1.5], 4, "whole number"),
        (None, 4, "whole number"),
        ([0, 1], 16, "does not name a VAE of 16 channels"),
    ],
)
def test_dataset_with_unusable_labels_or_unknown_vae_is_refused(tmp_path, labels, channels, words):
    repa_folder(tmp_path, labels, channels)
    with pytest.raises(UserError, match=words):
        haste.Data(tmp_path)

def test_damaged_file_of_a_dataset_is_named(world, tmp_path):
    prepare(world / "images", tmp_path / "data")
    (tmp_path / "data/images/00000/img00000003.png").write_bytes(b"torn")
    with pytest.raises(UserError, match="image or latent of 00000/img00000003.png cannot be read"):
        train(world, tmp_path, "--data-dir", tmp_path / "data", "--tau", 0)

def test_labels_are_dropped_at_the_rate_of_cfg_prob(world):
    data, batch = haste.Data(world / "data"), {"y": torch.ones(20_000).long()}
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = data.condition(batch, u, 0.1).bincount().tolist()
    assert counts == pytest.approx([0, 18_000, 0, 0, 2000], abs=200)
    assert torch.equal(data.condition(batch, u, 0.0), batch["y"])


# ---- 7. Checkpoints and VAEs -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A run through both phases, with two grids."""
    out = tmp_path_factory.mktemp("trained")
    train(world, out, "--sampling-steps", 3, "--cfg-prob", 0.5)
    return out

def saved_as(state, folder, name="0000000.pt", **how):
    """Saves a checkpoint, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name, **how)
    return folder / name

def renamed(rename):
    """The change of a checkpoint that renames its weights."""
    return lambda saved: {
        key: {rename(k): x for k, x in saved[key].items()} for key in ("model", "ema")
    }

def without_projector(saved):
    return {
        key: {k: x for k, x in saved[key].items() if not k.startswith("projectors")}
        for key in ("model", "ema")
    }

# What other trainers write, as changes of what ours does.
CHANGES = {
    "bare": lambda saved: saved.pop("ema"),
    "of DDP": renamed("module.{}".format),
    "compiled": renamed(lambda name: name.replace("blocks.", "blocks._orig_mod.")),
    "without args": lambda saved: {"args": None},
    "without EMA": lambda saved: {"ema": None, "opt": None},
    "without projector": without_projector,
    "with args of numpy and pathlib": lambda saved: {
        "args": saved["args"] | {"a": np.float64(1), "b": np.int64(3), "c": pathlib.PosixPath("/x")}
    },
    "with a namespace": lambda saved: {"args": argparse.Namespace(**saved["args"])},
    "of torch's old format": lambda saved: {},
}

@pytest.mark.parametrize("change", CHANGES)
def test_other_trainers_checkpoints_load_for_sampling_and_as_a_start(
    world, trained, tmp_path, capsys, change
):
    saved = checkpoint(trained, 6) | {"args": {"model": "SiT-XS/2", "num_classes": 4}}
    wanted = saved["model" if change == "without EMA" else "ema"]
    changed = CHANGES[change](saved)
    state = changed if change == "bare" else saved | changed
    new_format = change != "of torch's old format"
    path = saved_as(state, tmp_path / "run/checkpoints", _use_new_zipfile_serialization=new_format)
    model, args = haste.load_ema(path, "SiT-XS/2")
    for key, x in model.state_dict().items():
        assert key.startswith("proj") or torch.equal(x, wanted[key])
    assert args["vae"] is None and model.num_classes == 4
    incomplete = change in ("bare", "without EMA", "without projector")
    assert train(world, tmp_path, "--max-train-steps", 5 if change == "bare" else 8) == 0
    assert ("starts from zero" in capsys.readouterr().out) == incomplete

@pytest.mark.parametrize(
    "args, words",
    [
        ({"path_type": "cosine"}, "cosine"),
        ({"path_type": "GVP", "prediction": "velocity"}, "gvp"),
        ({"prediction": "noise", "path_type": "Linear"}, "noise"),
    ],
)
def test_checkpoint_of_another_process_is_refused(trained, tmp_path, args, words):
    state = {"ema": checkpoint(trained, 6)["ema"], "args": args | {"model": "SiT-XS/2"}}
    with pytest.raises(UserError, match=words):
        haste.load_ema(saved_as(state, tmp_path), None)

@pytest.mark.parametrize(
    "key", ["decoder_blocks.0.weight", "projectors.1.0.weight", "blocks.0.attn.q_norm.w"]
)
def test_checkpoint_of_another_model_is_refused_with_its_first_key(trained, tmp_path, key):
    state = checkpoint(trained, 6)["ema"]
    with pytest.raises(UserError, match=key):
        haste.load_ema(saved_as(state | {key: torch.ones(3)}, tmp_path), "SiT-XS/2")
    with pytest.raises(UserError, match="name the right --model"):
        haste.load_ema(saved_as({"ema": state}, tmp_path), "SiT-S/2")

class Payload:
    def __reduce__(self):
        return os.system, ("true",)

def test_nothing_in_a_checkpoint_is_unpickled_and_its_type_is_named(tmp_path):
    with pytest.raises(UserError, match="posix.system"):
        haste.read_checkpoint(saved_as({"model": {}, "args": Payload()}, tmp_path), "SiT-XS/2")

def sits_own(model, x, t, y):
    """SiT's convention for the weights of `model` with 2C output channels: the first C, its own time."""
    first, _, second = model.t_embedder.mlp
    angle = t[:, None] * haste.frequencies()
    hidden = first(torch.cat([angle.cos(), angle.sin()], 1))
    c, tokens = second(F.silu(hidden)) + model.y_embedder(y), model.x_embedder(x) + model.pos_embed
    for block in model.blocks:
        tokens, _ = block(tokens, c)
    return haste.unpatchify(model.final_layer(tokens, c), 2)[:, : x.shape[1]]

@torch.no_grad()
def test_sits_own_checkpoints_are_converted_exactly(tmp_path, world):
    torch.manual_seed(0)
    theirs = awake(
        haste.build_model("SiT-XS/2", input_size=8, in_channels=3, num_classes=4, out_channels=6)
    )
    state = {k: x for k, x in theirs.state_dict().items() if not k.startswith("projectors")}
    args = argparse.Namespace(model="SiT-XS/2", path_type="Linear", prediction="velocity", vae="ema")
    ours, _ = haste.load_ema(
        saved_as({"ema": state, "args": args}, tmp_path / "run/checkpoints"), None
    )
    x, t, y = torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([0, 1, 4])
    wanted = -sits_own(theirs, x, 1 - t, y)
    assert torch.allclose(ours(x, t, y), wanted, atol=2e-5) and wanted.abs().max() > 0.1
    with torch.enable_grad():
        assert train(world, tmp_path) == 0  # and it can start a HASTE run
    as_dit, _ = haste.load_ema(saved_as(state, tmp_path, "dit.pt"), "DiT-XS/2")
    assert isinstance(as_dit, haste.DiT)  # the same shapes are a DiT's under a DiT's name

@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_damaged_newest_checkpoint_is_passed_over_by_name(world, trained, tmp_path, capsys, harm):
    # a run with a whole checkpoint, a newer one that is damaged, and one that was never complete
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    whole, newest = (
        (trained / f"run/checkpoints/{name}").read_bytes() for name in ("0000004.pt", "0000006.pt")
    )
    half = len(newest) // 2
    rest = b"" if harm == "cut" else bytes([newest[half] ^ 255]) + newest[half + 1 :]
    (folder / "0000004.pt").write_bytes(whole)
    (folder / "0000006.pt").write_bytes(newest[:half] + rest)
    (folder / "0000008.pt.part").write_bytes(b"a killed save")
    train(world, tmp_path, "--cfg-prob", 0.5)
    assert "0000006.pt is damaged" in capsys.readouterr().out
    assert checkpoints(tmp_path) == ["0000004.pt", "0000006.pt"]
    assert same(checkpoint(tmp_path, 6), checkpoint(trained, 6))
    # and with none that is whole
    for path in folder.iterdir():
        path.write_bytes(b"PK cut")
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
    diffusers, safetensors = map(pytest.importorskip, ("diffusers", "safetensors.torch"))
    diffusers.AutoencoderKL(block_out_channels=[32], latent_channels=4).save_pretrained(tmp_path)
    vae = haste.load_decoder("any", str(tmp_path), types.SimpleNamespace(in_channels=4))
    assert haste.to_images(torch.randn(2, 4, 8, 8), vae, 0.2).dtype == torch.uint8
    with pytest.raises(UserError, match="4 channels, the model 16"):
        haste.load_decoder("any", str(tmp_path), types.SimpleNamespace(in_channels=16))
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = safetensors.load_file(path)
    weights.pop("decoder.conv_in.weight")
    safetensors.save_file(weights, path, {"format": "pt"})
    haste.load_vae.cache_clear()
    with pytest.raises(UserError, match="decoder.conv_in.weight"):
        haste.load_vae(str(tmp_path))

def test_pixels_are_clamped_and_truncated_as_in_the_paper():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 2.0]).view(5, 1, 1, 1)
    assert haste.to_images(x, None, 1.0).flatten().tolist() == [0, 0, 127, 254, 255]


# ---- 8. Training -------------------------------------------------------------------------------------------

def test_run_through_both_phases_leaves_checkpoints_metrics_and_grids(trained):
    assert checkpoints(trained) == [f"{step:07d}.pt" for step in (2, 3, 4, 6)]
    assert metrics(trained, "phase") == [1, 1, 1, 2, 2, 2]
    for line in metrics(trained):
        total = line["loss_diff"] + 0.5 * line["loss_repa"] + 0.5 * line["loss_atta"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert (line["loss_atta"] > 0) == (line["phase"] == 1)
    assert sorted(p.name for p in (trained / "run/samples").iterdir()) == [
        "0000003.png",
        "0000006.png",
    ]
    assert checkpoint(trained, 6)["args"]["classes"][3] == "class3"

def test_nothing_of_phase_one_runs_after_tau(world, latents, tmp_path, monkeypatch):
    teacher = record_calls(monkeypatch, haste.Teacher, "forward")
    images = record_calls(monkeypatch, Image, "open")
    attention = record_calls(monkeypatch, haste, "attention_loss")
    train(world, tmp_path, "--data-dir", latents)
    assert (len(teacher), len(images), len(attention)) == (3, 3 * 8, 3)
    before, after = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    for key, x in after["model"].items():
        stays = key.startswith("projectors") or key == "pos_embed"
        assert torch.equal(before["model"][key], x) == stays
        assert torch.equal(before["ema"][key], after["ema"][key]) == stays

def test_tau_0_never_loads_a_teacher_and_lambda_a_0_is_repa(world, tmp_path, monkeypatch):
    train(world, tmp_path / "plain", "--tau", 0, "--teacher", "no such teacher")
    monkeypatch.setattr(haste, "attention_loss", None)
    train(world, tmp_path / "repa", "--tau", "never", "--lambda-a", 0)
    assert all(metrics(tmp_path / "repa", "loss_repa"))
    assert not any(metrics(tmp_path / "repa", "loss_atta"))
    with pytest.raises(UserError, match="no such teacher"):
        train(world, tmp_path / "aligned", "--teacher", "no such teacher")

@pytest.mark.parametrize(
    "kind",
    [
        "--precision=fp32",
        "--precision=fp16",
        "--precision=bf16",
        "--gradient-accumulation-steps=2",
        "--model=DiT-XS/2",
    ],
)
def test_resume_is_bit_exact(world, tmp_path, kind):
    train(world, tmp_path / "whole", kind)
    for stop in (2, 3, 4):  # before, at and after tau
        train(world, tmp_path / f"{stop}", kind, "--max-train-steps", stop)
        train(world, tmp_path / f"{stop}", kind)
        assert same(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / f"{stop}", 6))

def test_accumulation_equals_one_batch(world, tmp_path):
    for parts in (1, 4):
        train(world, tmp_path / f"{parts}", "--gradient-accumulation-steps", parts)
    one, four = (metrics(tmp_path / parts, "grad_norm") for parts in "14")
    assert one == pytest.approx(four, rel=1e-3)

def test_two_processes_do_what_one_does(world, tmp_path):
    train(world, tmp_path / "one")
    _, err = run(line(world, tmp_path / "two"), processes=2)
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-3, err
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)

def test_ema_starts_at_the_initial_weights_and_follows(world, tmp_path):
    train(world, tmp_path, "--ema-decay", 0.5, "--max-train-steps", 2, "--checkpointing-steps", 1)
    torch.manual_seed(0)
    sizes = dict(input_size=8, in_channels=3, num_classes=4, teacher_dim=24)
    ema = haste.build_model("SiT-XS/2", **sizes).state_dict()
    for step in (1, 2):
        saved = checkpoint(tmp_path, step)
        ema = {k: (x + saved["model"][k]) / 2 for k, x in ema.items()}
        assert all(torch.allclose(saved["ema"][k], ema[k], atol=1e-6) for k in ema)

@pytest.mark.parametrize("asked, used", [(0.1, 0.1), (0, math.inf)])
def test_gradients_are_clipped_to_the_norm_asked_for(world, tmp_path, monkeypatch, asked, used):
    calls = record_calls(monkeypatch, nn.utils, "clip_grad_norm_")
    train(world, tmp_path, "--max-grad-norm", asked, "--max-train-steps", 1)
    assert [norm for _, norm in calls] == [used]

def poison(monkeypatch, value, only=None):
    """Makes the loss of the step that comes as number `only`, or of each, `value`."""
    real, seen = haste.losses, []

    def poisoned(*given):
        seen.append(1)
        diff, *rest = real(*given)
        return diff * value if len(seen) == (only or len(seen)) else diff, *rest

    monkeypatch.setattr(haste, "losses", poisoned)

@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_step_that_is_not_finite_is_skipped(world, tmp_path, monkeypatch, precision):
    poison(monkeypatch, math.nan, only=3)
    train(world, tmp_path, "--precision", precision, "--checkpointing-steps", 1, "--tau", 0)
    before, after = checkpoint(tmp_path, 2), checkpoint(tmp_path, 3)
    assert same(before["model"], after["model"]) and same(before["opt"], after["opt"])
    assert not same(after["model"], checkpoint(tmp_path, 4)["model"])
    skipped = dict(zip(metrics(tmp_path, "step"), metrics(tmp_path, "skipped_steps")))
    assert skipped == {1: 0, 2: 0, 4: 1, 5: 0, 6: 0}  # means are of steps that were taken

def test_too_many_skipped_steps_in_a_row_end_the_run(world, tmp_path, monkeypatch):
    monkeypatch.setattr(haste, "MAX_SKIPPED", 3)
    poison(monkeypatch, math.inf)
    with pytest.raises(UserError, match="no finite gradient in 3 steps"):
        train(world, tmp_path, "--tau", 0)

def test_auto_fires_once_and_a_resumed_run_does_not_ask_again(world, tmp_path, monkeypatch):
    asked = []

    def measure(model, teacher, data, args, step, size):
        asked.append(step)
        return [0.3, 0.3, 0.3, -1.1]

    monkeypatch.setattr(haste, "measure_cosines", measure)
    auto = "--tau", "auto", "--tau-from", 2, "--tau-every", 2, "--tau-cosine", -0.04
    train(world, tmp_path, *auto, "--max-train-steps", 3)
    train(world, tmp_path, *auto)
    assert asked == [2] and checkpoint(tmp_path, 3)["tau"] == 2
    assert metrics(tmp_path, "phase") == [1, 1, 2, 2, 2, 2] and len(metrics(tmp_path, "cosine")) == 1
    # begun with a number, and never fires
    train(world, tmp_path / "number", "--max-train-steps", 2)
    train(world, tmp_path / "number", *auto, "--tau-cosine", -2)
    assert asked == [2, 2, 4] and checkpoint(tmp_path / "number", 6)["tau"] is None

def launch(argv, processes=0, program=HASTE, **more):
    """Starts a program in processes of its own: by torchrun, or, for 0, without it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    command = [sys.executable, *(torchrun if processes else []), program, *map(str, argv)]
    return subprocess.Popen(command, **pipes | more)

def run(argv, processes=0, code=0, **more):
    """Runs a program in processes of its own, and returns what it prints."""
    process = launch(argv, processes, **more)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code and "Traceback" not in err, err
    return out, err

def test_compiled_blocks_share_two_graphs_and_give_the_same_losses(world, tmp_path, monkeypatch):
    train(world, tmp_path / "eager")
    graphs, modules, real = [], [], nn.Module.compile
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(1)
        return graph.forward

    def compile_module(self, **how):
        modules.append(type(self))
        real(self, backend=backend, **how)

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    train(world, tmp_path / "compiled", "--compile")
    assert len(graphs) <= 2 and set(modules) == {haste.Block}
    eager, compiled = (metrics(tmp_path / kind, "loss") for kind in ("eager", "compiled"))
    assert eager == pytest.approx(compiled, rel=1e-5)

def test_compiling_without_a_compiler_is_one_sentence(world, tmp_path, monkeypatch):
    monkeypatch.setattr(haste.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="install g"):
        train(world, tmp_path, "--compile", "--tau", 0)


# --- Faults

def wait_for_checkpoint(out, process):
    """Returns when the run has saved, and so is in the midst of its loop."""
    end = time.time() + 100
    while not list((out / "run/checkpoints").glob("*.pt")):
        assert time.time() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)

@pytest.mark.parametrize("name, processes", [("SIGTERM", 0), ("SIGHUP", 0), ("SIGTERM", 2)])
def test_stop_signal_saves_once_and_asks_to_be_started_again(world, tmp_path, name, processes):
    process = launch(line(world, tmp_path, "--max-train-steps", 100_000), processes)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    # torchrun has an exit code of its own
    assert process.returncode == (1 if processes else 75), err
    step = metrics(tmp_path, "step")[-1]
    assert checkpoints(tmp_path)[-1] == f"{step:07d}.pt"
    assert f"saved after step {step}; stopped" in out

def test_hangup_that_nohup_ignores_stays_ignored_and_nobody_need_read_the_output(world, tmp_path):
    process = launch(
        line(world, tmp_path, "--max-train-steps", 40),
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.stdout.close()
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0 and checkpoints(tmp_path)[-1] == "0000040.pt"

def test_signal_ends_a_wait_for_data_and_the_work_is_saved(world, tmp_path, monkeypatch):
    real, reads = haste.Data.__getitem__, []

    def starving(self, i):
        reads.append(i)
        # the first image gives the shape; then come two steps of 8, and a part of the third
        if len(reads) == 1 + 2 * 8 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, i)

    monkeypatch.setattr(haste.Data, "__getitem__", starving)
    assert train(world, tmp_path, "--checkpointing-steps", 100) == 75
    assert checkpoints(tmp_path) == ["0000002.pt"]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

def test_second_ctrl_c_acts_at_once():
    stop = haste.StopSignals()
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
    loader = haste.DataLoader(
        data, batch_size=2, num_workers=1, worker_init_fn=haste.ignore_stop_signals
    )
    with pytest.raises(UserError, match=r"shm-size.*num-workers 0.*No space left on device"):
        next(haste.load_batches(loader, haste.StopSignals()))

def test_wandb_gets_a_safe_id_and_its_errors_are_one_sentence(world, tmp_path, monkeypatch):
    stub, steps = types.ModuleType("wandb"), []
    stub.run, stub.log = None, lambda line, step: steps.append(step)
    stub.init = lambda **how: setattr(stub, "run", how)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    train(world, tmp_path, "--wandb", "project", "--exp-name", "a/b c")
    assert stub.run["id"] == "a-b-c" and steps == [1, 2, 3, 4, 5, 6]

    def refuse(**how):
        raise PermissionError("no API key\nrun wandb login")

    stub.run, stub.init = None, refuse
    with pytest.raises(UserError, match="no API key"):
        train(world, tmp_path, "--wandb", "project")

@pytest.mark.parametrize(
    "more, words",
    {
        "--batch-size 7 --gradient-accumulation-steps 2": "must divide into 2 equal parts",
        "--model SiT-XS/8 --data-dir odd": "needs inputs that divide by 8, not 12",
        "--teacher-blocks 9": "must have the same length",
        "--attention-blocks 1 2 6": "no block 6",
        "--model MMDiT": "needs captions",
        "--data-dir nowhere": "no dataset in nowhere",
        "--model SiT-M/2": "unknown model SiT-M/2",
        "--model SiT": "unknown model SiT",
    }.items(),
)
def test_flags_that_do_not_fit_get_one_sentence(world, tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    if "odd" in more:
        prepare(world / "images", "odd", "--resolution", 12)
    assert words in complaint(*line(world, tmp_path, *more.split()))

def test_checkpoint_of_another_model_is_kept_and_refused(world, trained, tmp_path):
    saved_as(checkpoint(trained, 6), tmp_path / "run/checkpoints", "0000001.pt")
    argv = line(world, tmp_path, "--model", "SiT-XS/4", "--cfg-prob", 0.5)
    assert "another --exp-name" in complaint(*argv)
    assert checkpoints(tmp_path) == ["0000001.pt"]

def test_rank_without_world_size_is_one_sentence(world, tmp_path):
    _, err = run(line(world, tmp_path), code=1, env=os.environ | {"RANK": "0"})
    assert "torchrun" in err

def test_defaults_are_the_papers(capsys):
    wanted = {
        "model": "SiT-XL/2",
        "batch_size": 256,
        "learning_rate": 1e-4,
        "ema_decay": 0.9999,
        "cfg_prob": 0.1,
        "max_grad_norm": 1.0,
        "lambda_r": 0.5,
        "lambda_a": 0.5,
        "tau_from": 50_000,
        "tau_every": 10_000,
        "tau_images": 2048,
        "tau_cosine": -0.05,
    }
    args = parse("")
    assert wanted.items() <= vars(args).items()
    names = "SiT-B/2 SiT-L/2 SiT-XL/2 DiT-XL/2 MMDiT".split()
    assert [haste.parse_name(name)[1].tau for name in names] == [
        100_000,
        250_000,
        250_000,
        250_000,
        200_000,
    ]
    haste.resolve(args, types.SimpleNamespace(shape=(4, 64, 64), captions=None, images=Path("/")))
    assert args.tau == 300_000  # at 512 px
    assert (args.attention_blocks, args.teacher_blocks) == ((4, 5, 6, 7), (8, 9, 10, 11))

def test_repas_and_hastes_names_of_flags_are_understood(capsys):
    args = parse("--early-stop-point 7 --proj-coeff 1 --attn-coeff 2 --enc-type x")
    assert (args.tau, args.lambda_r, args.lambda_a, args.teacher) == (7, 1, 2, "x")
    with pytest.raises(SystemExit):
        parse("--tau sometimes")
    assert "invalid int_never_or_auto value: 'sometimes'" in capsys.readouterr().err

def test_terminal_that_lacks_a_letter_does_not_end_a_run(tmp_path):
    with open(tmp_path / "terminal", "w", encoding="ascii") as terminal:
        haste.Output(terminal).write("caf\u00e9")
    assert (tmp_path / "terminal").read_text() == "caf\\xe9"


# ---- 9. Sampling -------------------------------------------------------------------------------------------

def test_sample_draws_the_labels_asked_for_and_names_their_classes(trained, tmp_path, capsys):
    draw = f"--sample {trained}/run/checkpoints/0000006.pt --num-steps 2 --out {tmp_path}/grid.png --labels "
    haste.sample_from(parse(draw + "3 0"))
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * 9 + 1, 10)
    assert "3 class3, 0 class0" in capsys.readouterr().out
    assert "classes are 0 to 3" in complaint(*draw.split(), 4)

def test_model_without_label_dropout_cannot_be_guided(world, tmp_path):
    train(world, tmp_path, "--cfg-prob", 0, "--sampling-steps", 6)  # its grids are not
    draw = f"--sample {tmp_path}/run/checkpoints/0000006.pt --num-steps 2 --out {tmp_path}/grid.png"
    assert "use --cfg-scale 1" in complaint(*draw.split())
    haste.sample_from(parse(draw + " --cfg-scale 1"))


# ---- 10. DiT and MM-DiT ------------------------------------------------------------------------------------

def test_dits_code_gives_the_same_figures(monkeypatch):
    """Loss, gradients and 12 respaced guided steps of facebookresearch/DiT, run on numpy's frozen streams."""
    sizes = dict(input_size=16, in_channels=4, hidden_size=96, num_classes=10)
    model = with_frozen_weights(tiny_model(haste.DiT, **sizes), without="projectors")
    x0, eps = 0.5 * frozen(1, 3, 4, 16, 16), frozen(2, 3, 4, 16, 16)
    t, y = torch.tensor([0, 0.0375, 0.8]), torch.tensor([3, 7, 1])

    def loss(i):
        return haste.losses(model, haste.DDPM(), x0[i], eps[i], t[i], y[i], None, 1, 1)[0]

    assert [loss([i]).item() for i in range(3)] == near([4.971220, 2.421021, 2.295545], 1e-5)
    loss(slice(3)).backward()
    norms = {
        "x_embedder.proj.weight": 0.33424,
        "blocks.1.attn.qkv.weight": 0.605419,
        "final_layer.linear.weight": 2.372707,
    }
    assert_gradient_norms(model, norms)
    freeze_noise(monkeypatch)
    out = haste.sample(model, frozen(9, 3, 4, 16, 16), y, steps=12, cfg_scale=1.8, mode="ddpm")
    assert out[1, :, 11, 3].tolist() == near([-120.932564, -170.767593, -589.873779, -355.143188])
    assert out.abs().mean().item() == near(226.444138)

def test_time_becomes_one_of_dits_1000_timesteps():
    def timesteps(t):
        return haste.DDPM().add_noise(x, x, t)[1].tolist()

    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    drawn = timesteps(torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    assert np.bincount(np.int64(drawn)).tolist() == pytest.approx([100] * 1000, abs=50)
    assert timesteps(torch.tensor([0, 1 - 2**-24, 1.0])) == [0, 999, 999]
    assert timesteps(torch.tensor(haste.TRIGGER_TIMES)) == [20, 100, 500, 800]

@pytest.mark.parametrize("steps", [250, 21, 1000])
def test_respaced_schedule_against_bayes(steps):
    kept, at = [], 0.0
    for _ in range(steps):
        kept.append(round(at))
        at += 999 / (steps - 1)
    abars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[kept]
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

class GaussianNoise(GaussianVelocity):
    """The exact noise in data from N(0, 1/4), E[eps | x_t], of label 0; half of it for the null label."""

    diffusion, guided_channels = haste.DDPM(), 3

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item()))
        signal, noise, *_ = haste.ddpm_at(t.long(), x.double())
        half = torch.where(y == 3, 0.5, 1.0).view(-1, 1, 1, 1)
        eps = noise / (signal**2 / 4 + noise**2) * x * half
        return torch.cat([eps, -torch.ones_like(eps)], dim=1).to(x.dtype)

@pytest.mark.parametrize("mode", ["ddpm", "sde"])
def test_dits_samplers_turn_noise_into_data_and_guide_three_channels(mode):
    noise, y = noise_and_labels(4, 16)

    def draw(*how):
        model = GaussianNoise()
        torch.manual_seed(0)
        return haste.sample(model, noise, y, *how, mode=mode), model.calls

    x, calls = draw(250)
    assert x.std().item() == pytest.approx(0.5, abs=0.03)
    assert [t for _, t in calls] == haste.ddpm_schedule(250, noise.device, torch.float64)[0][::-1]
    guided, _ = draw(250, 3.0)
    assert torch.equal(x[:, 3], guided[:, 3]) and ((x - guided)[:, :3] != 0).all()
    _, calls = draw(10, 3.0, (0.3, 0.7))
    assert [n for n, _ in calls] == [8 if 300 <= t <= 700 else 4 for _, t in calls]

def test_dit_has_sits_network_and_loads_its_authors_names():
    assert count_parameters("DiT-XL/2")[1] == 675_129_632
    assert tiny_model(haste.DiT).state_dict().keys() == tiny_model().state_dict().keys()

def test_released_mmdit_gives_the_same_figures():
    sizes = dict(hidden_size=288, depth=9, num_heads=9, teacher_dim=48, projector_dim=96)
    model = with_frozen_weights(haste.MMDiT(**sizes))
    v, z, qk = model(
        frozen(1, 2, 4, 32, 32), torch.tensor([0.3, 0.8]), frozen(2, 2, 7, 768), align=True
    )
    assert v[0, :, 5, 9].tolist() == near([-1.149736, -0.551603, 1.262833, -1.376827])
    assert z[0, 17, :3].tolist() == near([0.203212, -0.38475, -0.734253])
    q, k = qk[2]
    assert (q @ k.mT / 32**0.5)[1, 3, 10, :3].tolist() == near([0.281714, 1.998466, -0.598364])
    v.square().mean().backward()
    norms = {
        "context_embedder.weight": 0.066919,
        "joint_blocks.8.context_block.attn.qkv.weight": 0.020626,
        "joint_blocks.5.x_block.attn.qkv.weight": 0.395535,
    }
    assert_gradient_norms(model, norms)

def test_mmdits_parameters_are_those_of_the_released_code():
    named, count = count_parameters("MMDiT")
    assert count - named["pos_embed"].numel() == 505_070_608
    prefix = "joint_blocks.23.context_block."
    last = {name.removeprefix(prefix) for name in named if name.startswith(prefix)}
    layers = ("attn.qkv", "adaLN_modulation.1")
    assert last == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}

def test_text_is_never_supervised_and_no_parameter_is_unused():
    torch.manual_seed(0)
    model = haste.MMDiT(**TINY | {"depth": 10, "attention_blocks": (4, 5, 6, 7), "feature_block": 8})
    target = haste.Teacher(tiny_vit(), (8, 9, 10, 11), 4)(tensor_of(bytes_of(2)))
    x0, eps = torch.randn(2, 2, 3, 8, 8)
    y = torch.randn(2, 5, 768)
    diff, _, atta = haste.losses(model, haste.Flow(), x0, eps, torch.rand(2), y, target, 1, 1)
    atta.backward(retain_graph=True)
    for name, p in model.named_parameters():
        if ".context_block." in name:
            block = int(name.split(".")[1])
            assert block == 6 or (p.grad is None if block > 6 else p.grad.any())
    model.zero_grad()
    diff.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert all(name.startswith(("projectors", "pos_embed")) for name in unused)

@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of one block, which knows four letters, in place of the real one."""
    transformers, folder = pytest.importorskip("transformers"), tmp_path_factory.mktemp("clip")
    letters = '"a": 2, "0</w>": 3, "1</w>": 4, "e</w>": 5'
    (folder / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, %s}' % letters)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt").save_pretrained(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=6,
        hidden_size=768,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=12,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.CLIPTextModel(config).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(haste, "CLIP", str(folder))
        patch.setitem(haste.CONFIGS, "MMDiT", haste.Config(3, 32, 4, (1,), 2, 16, (10,), 3))
        haste.load_clip.cache_clear()
        yield
    haste.load_clip.cache_clear()

@pytest.fixture
def coco(tmp_path):
    """COCO's JSON for the world's images, with two captions of each."""
    images = [{"id": 7 * i, "file_name": f"{i:02d}.png"} for i in range(40)]
    captions = [
        {"image_id": 7 * i, "caption": f" image {i} {k} "} for i in range(40) for k in range(2)
    ]
    text = json.dumps({"images": images, "annotations": captions})
    (tmp_path / "coco.json").write_text(text, "utf-8-sig")
    return tmp_path / "coco.json"

def test_captions_are_dropped_and_chosen_by_one_number(world, coco, tmp_path):
    data = prepare(world / "images", tmp_path / "data", "--captions", coco)
    u = torch.tensor([0.05, 0.1, 0.54, 0.56, 0.999])
    first, last = (data.captions[data.names[i]] for i in (0, 39))
    chosen = haste.choose_captions(data, torch.tensor([0, 0, 0, 0, 39]), u, 0.1)
    assert chosen == ["", first[0], first[0], first[1], last[1]]

def test_images_without_captions_are_refused(world, coco, tmp_path):
    coco.write_text(coco.read_text("utf-8-sig").replace('"00.png"', '"none.png"'))
    with pytest.raises(UserError, match="lacks the captions of an image"):
        prepare(world / "images", tmp_path / "data", "--captions", coco)

def test_mmdit_trains_through_tau_resumes_and_draws_captions(world, clip, coco, tmp_path, capsys):
    prepare(world / "images", tmp_path / "data", "--captions", coco)
    more = "--data-dir", tmp_path / "data", "--model", "MMDiT"
    train(world, tmp_path / "a", *more, "--sampling-steps", 6)
    train(world, tmp_path / "b", *more, "--max-train-steps", 2)
    train(world, tmp_path / "b", *more)
    assert distance(tmp_path / "a", tmp_path / "b") == 0
    path = tmp_path / "a/run/checkpoints/0000006.pt"
    draw = f"--sample {path} --num-steps 2 --out {tmp_path}/grid.png --captions"
    haste.sample_from(parse(draw, "a red bus", "a cat"))
    assert "a red bus, a cat" in capsys.readouterr().out


# ---- evaluate.py: the network and the metrics --------------------------------------------------------------

SMALL = {"POOL_DIM": 24, "SPATIAL_DIM": 20, "LOGITS_DIM": 12}

class TinyInception(nn.Module):
    """Stands in for the Inception: 24, 20 and 12 features."""

    def __init__(self, weights=None):
        super().__init__()
        self.register_buffer("w", frozen(0, 12, 56))

    def forward(self, images):
        x = F.adaptive_avg_pool2d(images.float() / 64, 2).flatten(1)
        return (x @ self.w).sin().split([24, 20, 12], dim=1)

@pytest.fixture
def tiny(monkeypatch):
    """TinyInception in place of the Inception."""
    for name, value in {"Inception": TinyInception, **SMALL}.items():
        monkeypatch.setattr(evaluate, name, value)

def parse_evaluate(*argv):
    return evaluate.parse_args(["--num-workers", "0", *map(str, argv)])

def score(*argv):
    return evaluate.evaluate(parse_evaluate(*argv))

def save_npz(path, arr_0, **more):
    np.savez(path, arr_0=arr_0, **more)
    return path

@pytest.mark.parametrize(
    "height, width", [(1, 1), (2, 3), (32, 32), (299, 299), (300, 64), (512, 299)]
)
def test_resize_is_tensorflow_1s_to_the_bit(height, width):
    x = bytes_of(1, 0, (height, width))[0, :, :, 0].astype(np.float32)
    got = evaluate.tf1_resize(torch.from_numpy(x)[None, None])

    def grid(n):
        at = np.arange(299, dtype=np.float32) * np.float32(n / 299)
        low = np.floor(at)
        return low.astype(int), np.minimum(low + 1, n - 1).astype(int), at - low

    top, bottom, dy = grid(height)
    left, right, dx = grid(width)
    x = x[:, left] + (x[:, right] - x[:, left]) * dx
    x = x[top] + (x[bottom] - x[top]) * dy[:, None]
    assert np.array_equal(got[0, 0], x)

def naive_score(logits):
    """Split by split, with softmax as it is written."""
    scores = []
    for part in np.split(logits, range(evaluate.SPLIT_SIZE, len(logits), evaluate.SPLIT)):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    return np.mean(scores)

def naive_distance(x, y):
    """tr (S_1 S_2)^(1/2) of x (n, d), y (m, d) is the nuclear norm of X Y^T over sqrt((n - 1) (m - 1))."""
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    x, y = ((a - a.mean(0)) / math.sqrt(len(a) - 1) for a in (x, y))
    return means + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc")

def naive_precision(x, y):
    """The share of x that is no farther from one of y than that one's third neighbour in y is."""
    radii = [sorted(((a - b) ** 2).sum() for b in y)[3] for a in y]
    return np.mean([any(((a - b) ** 2).sum() <= r for b, r in zip(y, radii)) for a in x])

def naive_metrics(network, x, y):
    (x, x_s, logits), (y, y_s, _) = (
        [part.double().numpy() for part in network(tensor_of(a))] for a in (x, y)
    )
    return {
        "fid": naive_distance(x, y),
        "sfid": naive_distance(x_s, y_s),
        "is": naive_score(logits),
        "precision": naive_precision(x, y),
        "recall": naive_precision(y, x),
    }

def compare(folder, x, y, *more):
    """The metrics of the images x against the reference y, both of an .npz."""
    return score(
        "--samples", save_npz(folder / "x.npz", x), "--ref", save_npz(folder / "y.npz", y), *more
    )

@torch.no_grad()
def test_metrics_are_those_of_torch_fidelitys_features(tmp_path, monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path, kept, real = tmp_path / "weights.pth", {}, evaluate.randomise

    def randomise_and_save(net):
        real(net)
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

    smooth = bytes_of(16, 1, (2, 2)).repeat(20, 1).repeat(20, 2)
    x, y = smooth[:8], smooth[8:] // 2 + bytes_of(8, 2, (40, 40)) // 2
    got = compare(tmp_path, x, y, "--inception", path)
    assert got == pytest.approx(naive_metrics(network, x, y), rel=2e-6) and got["is"] > 1.1

@pytest.mark.parametrize("n, m", [(200, 150), (12, 9), (9, 200)])
def test_frechet_distance_is_exact_also_without_full_rank(n, m):
    x, y = frozen(0, n, 30).double(), frozen(1, m, 30).double() @ frozen(2, 30, 30).double() + 1
    got = evaluate.frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert got == pytest.approx(naive_distance(x.numpy(), y.numpy()), rel=1e-9)

@pytest.mark.parametrize("n", [60, 50, 20])
def test_metrics_are_those_of_the_formulas_in_full_fp32(tiny, tmp_path, monkeypatch, n):
    monkeypatch.setattr(evaluate, "SPLIT_SIZE", 25)
    x, y = bytes_of(n), bytes_of(50, 1) // 2 + 60
    got = compare(tmp_path, x, y, "--batch-size", 7)
    assert got == pytest.approx(naive_metrics(TinyInception(), x, y), rel=1e-6)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


# ---- evaluate.py: images -----------------------------------------------------------------------------------

def test_npz_folder_and_prepared_dataset_give_the_same_figures(tiny, tmp_path, monkeypatch):
    images, ref = bytes_of(30), save_npz(tmp_path / "ref.npz", bytes_of(40, 1))
    save_npz(tmp_path / "stored.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", labels=np.arange(30), arr_0=images)
    write_pngs(tmp_path / "tree" / "class", images)
    prepare(tmp_path / "tree", tmp_path / "data")
    reads = record_calls(monkeypatch, zipfile.ZipExtFile, "read")
    found = [
        score("--samples", tmp_path / name, "--ref", ref, "--batch-size", 8, "--num-workers", workers)
        for name in ("stored.npz", "packed.npz", "tree", "data")
        for workers in (0, 2 * (name in ("packed.npz", "tree")))
    ]
    assert found == found[:1] * 8
    assert all(0 <= n <= 8 * 192 for _, n in reads)  # a batch or a header, never the whole

def test_folder_follows_links_and_names_what_it_leaves_out(tmp_path, capsys):
    folder = write_pngs(tmp_path / "samples" / "0", bytes_of(4)).parent
    (folder / "1").symlink_to(write_pngs(tmp_path / "elsewhere", bytes_of(4, 1)))
    write_pngs(folder / ".cache", bytes_of(2, 2))
    (folder / "notes.txt").write_text("no image")
    images = evaluate.Folder(folder)
    assert len(images) == 8 and torch.equal(images[range(4, 8)], tensor_of(bytes_of(4, 1)))
    assert "1 files are no images and left out: notes.txt" in capsys.readouterr().out

def test_a_reference_that_make_ref_wrote_gives_the_same_figures(tiny, tmp_path, monkeypatch, capsys):
    real, ref = write_pngs(tmp_path / "real", bytes_of(30)), tmp_path / "sub" / "ref.npz"
    samples = "--samples", save_npz(tmp_path / "samples.npz", bytes_of(35, 1))
    score("--make-ref", real, "--out", ref)
    wanted = score(*samples, "--ref", real)
    assert score(*samples, "--ref", ref) == pytest.approx(wanted, rel=1e-9)
    made = dict(np.load(ref))
    assert np.array_equal(made.pop("arr_0"), bytes_of(30))
    np.savez(tmp_path / "statistics.npz", **made)
    del wanted["precision"], wanted["recall"]
    assert score(*samples, "--ref", tmp_path / "statistics.npz") == pytest.approx(wanted, rel=1e-9)
    assert "precision and recall are left out" in capsys.readouterr().out
    own = save_npz(tmp_path / "own.npz", bytes_of(40, 6), **made)
    assert abs(score("--samples", own, "--ref", ref)["fid"]) < 1e-6  # as ADM takes them
    monkeypatch.setattr(evaluate, "MAX_REFERENCES", 4)  # of many images a few, from all over
    score("--make-ref", real, "--out", ref)
    assert np.array_equal(np.load(ref)["arr_0"], bytes_of(30)[[0, 10, 19, 29]])
    monkeypatch.setattr(evaluate.Npz, "__getitem__", None)  # arr_0 is not needed
    score("--samples", real, "--ref", ref, "--no-prec-recall")

def test_what_makes_a_fid_incomparable_is_printed_and_stored(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "SPLIT_SIZE", 10)
    ref = save_npz(tmp_path / "ref.npz", bytes_of(20))
    (tmp_path / "samples" / "class").mkdir(parents=True)
    for i, array in enumerate(bytes_of(12, 1, (8, 12))):
        Image.fromarray(array).save(tmp_path / f"samples/class/{i}.JPG", "JPEG")
    path = tmp_path / "out.json"
    score("--samples", tmp_path / "samples", "--inception", "random", "--json", path, "--ref", ref)
    printed, notes = capsys.readouterr().out, json.loads(path.read_text())["notes"]
    wanted = ["(8, 12)", "random", "not 50,000", "JPEG", "folder by folder"]
    for words, note in zip(wanted, notes, strict=True):
        assert words in note and f"note: {note}\n" in printed
    score("--samples", ref, "--ref", ref)
    assert capsys.readouterr().out.count("note: ") == 1


# ---- evaluate.py: samples of a checkpoint ------------------------------------------------------------------

def save_checkpoint(path, seed=0, **args):
    """A SiT-XS/4 with random weights for 8 x 8 pixels and 4 classes; "model" has others than "ema"."""
    torch.manual_seed(seed)
    model, ema = (
        haste.build_model("SiT-XS/4", input_size=8, in_channels=3, num_classes=4) for _ in range(2)
    )
    state = {"model": model.state_dict(), "ema": awake(ema).state_dict(), "steps": 2}
    args = {"model": "SiT-XS/4", "vae": None, "scale": 1.0, "cfg_prob": 0.1} | args
    return saved_as(state | {"args": args}, path.parent, path.name)

@pytest.fixture
def drawing(tmp_path):
    """Flags that draw 20 samples of a checkpoint in 5 batches."""
    ref = save_npz(tmp_path / "ref.npz", bytes_of(30))
    path = save_checkpoint(tmp_path / "run/checkpoints/0000002.pt")
    return ["--ckpt", path, "--ref", ref, *"--num-samples 20 --batch-size 4 --num-steps 3".split()]

@pytest.fixture
def drawn(monkeypatch):
    """The list to which each batch of samples that is drawn will be added."""
    return record_calls(monkeypatch, evaluate.Sampler, "sample")

def read_folder(folder):
    """The bytes of each file, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}

def test_the_protocol_is_printed_and_stored(tiny, drawing, tmp_path, capsys):
    guided = "--mode heun --cfg-scale 1.5 --guidance-high 0.7 --inception random --balanced --seed 3"
    results = score(*drawing, *guided.split(), "--json", tmp_path / "out.json")
    folder = tmp_path / "run/eval/0000002-heun-3-cfg-1.5-in-0-0.7-seed-3-20-balanced"
    report, printed = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert report == json.loads(Path(f"{folder}.json").read_text())
    assert list(results) == ["fid", "sfid", "is", "precision", "recall"]
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
    assert results.items() <= report.items() and wanted.items() <= report["protocol"].items()
    for name, value in (results | report["protocol"]).items():
        assert f"{name:20} {value}\n" in printed

def test_samples_are_the_emas_and_a_function_of_seed_and_batch(tiny, drawing):
    score(*drawing)
    samples = evaluate.Sampler(parse_evaluate(*drawing, "--precision", "fp32"))
    assert same(samples.model.state_dict(), torch.load(samples.args.ckpt)["ema"])
    third = evaluate.Folder(samples.folder)[range(8, 12)]
    assert torch.equal(third, samples.sample(range(8, 12)))
    samples.args.seed = 1
    assert not torch.equal(third, samples.sample(range(8, 12)))

def test_the_sde_does_not_draw_its_starting_noise_again(drawing, monkeypatch):
    samples, seen = evaluate.Sampler(parse_evaluate(*drawing, "--precision", "fp32")), []

    def sample(model, noise, *more):
        seen.extend([noise, torch.randn_like(noise)])
        return noise

    monkeypatch.setattr(haste, "sample", sample)
    samples.sample(range(4))
    samples.sample(range(4, 8))
    assert (torch.corrcoef(torch.stack(seen).flatten(1)).abs() - torch.eye(4)).max() < 0.2

def test_only_missing_samples_are_drawn_and_the_figures_stay(tiny, drawing, drawn, tmp_path):
    drawing += ["--out", tmp_path / "mine"]
    whole, before = score(*drawing), read_folder(tmp_path / "mine")
    for name in ("000005.png", "000006.png", "000019.png"):
        (tmp_path / "mine" / name).unlink()
    (tmp_path / "mine/000007.png.part").write_bytes(b"what a killed process left")
    for _ in range(2):  # the second time draws nothing
        assert score(*drawing) == whole
        assert [rows.start for _, rows in drawn[5:]] == [4, 16]
    assert read_folder(tmp_path / "mine") == before
    given = "--samples", tmp_path / "mine", "--ref", tmp_path / "ref.npz", "--batch-size", 4
    assert score(*given) == whole

def test_samples_drawn_in_another_way_are_not_mixed(tiny, drawing, drawn, tmp_path):
    drawing += ["--out", tmp_path / "mine"]
    score(*drawing)
    before = read_folder(tmp_path / "mine")
    others = (
        "--seed=1 --num-steps=4 --cfg-scale=2 --guidance-high=.5 --mode=ode --balanced "
        "--precision=bf16 --batch-size=5 --num-samples=19"
    )
    for other in others.split():
        with pytest.raises(UserError, match="drawn by other flags"):
            score(*drawing, other)
    save_checkpoint(drawing[1], seed=1)
    with pytest.raises(UserError, match="drawn by other flags"):
        score(*drawing)
    assert read_folder(tmp_path / "mine") == before and len(drawn) == 5

def test_two_processes_draw_and_measure_what_one_does(tiny, drawing, tmp_path):
    drawing += ["--num-samples", 42, "--num-workers", 0, "--out"]
    one, script = score(*drawing, tmp_path / "one"), tmp_path / "tiny_evaluate.py"
    folders = [str(Path(path).parent) for path in (evaluate.__file__, __file__)]
    script.write_text(
        f"import sys; sys.path[:0] = {folders}\n"
        f"import evaluate, {Path(__file__).stem} as tests\n"
        f"vars(evaluate).update(tests.SMALL, Inception=tests.TinyInception)\n"
        f"evaluate.main()\n"
    )
    out, _ = run([*drawing, tmp_path / "two"], processes=2, program=script)
    assert out.count("\nrecall ") == 1
    two = json.loads((tmp_path / "two.json").read_text())
    assert {key: two[key] for key in one} == pytest.approx(one, rel=1e-9)
    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")

@pytest.mark.parametrize("more", [[], ["--balanced"]])
def test_labels_are_in_random_order_and_balanced_only_if_asked_for(drawing, more):
    y = evaluate.Sampler(parse_evaluate(*drawing, "--num-samples", 4000, *more)).labels
    counts, pairs = np.bincount(y), np.bincount(4 * y[:-1] + y[1:], minlength=16)
    assert (counts.tolist() == [1000] * 4) == bool(more)
    assert np.abs(counts - 1000).max() < 137  # five standard deviations, as below
    assert np.abs(pairs - 250).max() < 77

def test_latents_are_decoded_by_the_vae_that_the_protocol_names(tiny, drawing, tmp_path):
    diffusers, vae = pytest.importorskip("diffusers"), str(tmp_path / "vae")
    diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=3).save_pretrained(vae)
    save_checkpoint(drawing[1], vae=vae, scale=0.5)
    score(*drawing, "--num-samples", 4, "--out", tmp_path / "mine")
    assert json.loads((tmp_path / "mine.json").read_text())["protocol"]["VAE"] == vae

def test_an_mmdit_draws_the_first_captions_of_a_dataset(monkeypatch):
    texts, mmdit = [], haste.build_model("MMDiT", input_size=8, hidden_size=48, depth=1)
    data = types.SimpleNamespace(names=["a", "b"], captions={"a": ["one", "two"], "b": ["three"]})
    monkeypatch.setattr(haste, "Data", lambda folder: data)
    monkeypatch.setattr(haste, "load_ema", lambda *_: (mmdit, {"vae": None, "scale": 1.0}))

    def encode(captions):
        texts.append(captions)
        return torch.ones(len(captions), 2, 768)

    monkeypatch.setattr(haste, "encode_captions", encode)
    flags = "--ckpt m.pt --captions-from D --num-samples 4 --cfg-scale 2 --num-steps 2".split()
    evaluate.Sampler(parse_evaluate(*flags, "--precision", "fp32")).draw(range(4))
    assert texts[0] == [""] and sorted(texts[1]) == ["one", "one", "three", "three"]


# ---- evaluate.py: mistakes ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mess(tmp_path_factory):
    """A folder with good.npz, and with what a user might name in its place."""
    home, images = tmp_path_factory.mktemp("mess"), bytes_of(6)
    good = save_npz(home / "good.npz", images)
    save_npz(home / "float.npz", images / 255)
    save_npz(home / "nchw.npz", images.transpose(0, 3, 1, 2))
    save_npz(home / "three.npz", images[:3])
    np.savez(home / "pytorch_fid.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (home / "cut.npz").write_bytes(good.read_bytes()[:-200])
    (home / "empty").mkdir()
    write_pngs(home / "mixed", [*images, *bytes_of(1, 0, (9, 8))])
    torn = write_pngs(home / "torn", images) / "0003.png"
    torn.write_bytes(torn.read_bytes()[:99])
    saved_as({"w": torch.zeros(3)}, home, "vit.pth")
    save_checkpoint(home / "run.pt")
    save_checkpoint(home / "no_null.pt", cfg_prob=0)
    return home

BAD_IMAGES = {
    "nothing.npz": "nothing.npz",
    "float.npz": "float64",
    "nchw.npz": "(6, 3, 8, 8)",
    "three.npz": "holds 3 images",
    "cut.npz": "cut.npz",
    "empty": "no images",
    "mixed": "0006.png has the size [9, 8], and 0000.png [8, 8]",
    "torn": "0003.png cannot be read",
}

@pytest.mark.parametrize("path, words", BAD_IMAGES.items())
def test_bad_images_get_a_sentence_before_any_sample_is_drawn(
    tiny, mess, drawn, monkeypatch, path, words
):
    monkeypatch.chdir(mess)
    for flags in (
        f"--samples {path} --ref good.npz --num-workers 0",
        f"--samples {path} --ref good.npz --num-workers 1",
        f"--make-ref {path} --out ref.npz --num-workers 0",
        f"--ckpt run.pt --ref {path} --num-samples 20 --num-workers 0",
    ):
        assert words in complaint(*flags.split(), program=evaluate)
    assert not drawn and not Path("ref.npz").exists()

BAD_FLAGS = {
    "--samples good.npz --ref pytorch_fid.npz": "pytorch-fid and clean-fid",
    "--samples good.npz": "need --ref",
    "--ref good.npz": "use one of --ckpt",
    "--ckpt vit.pth --ref good.npz": "vit.pth",
    "--ckpt run.pt --ref good.npz --captions-from .": "is for an MMDiT",
    "--ckpt run.pt --ref good.npz --num-samples 4 --mode ddpm": "no sampler ddpm",
    "--ckpt run.pt --ref good.npz --num-samples 4 --out good.npz/below": "good.npz",
    "--ckpt no_null.pt --ref good.npz --num-samples 4 --cfg-scale 1.5": "without label dropout",
}

@pytest.mark.parametrize("flags, words", BAD_FLAGS.items())
def test_a_mistake_in_evaluates_flags_gets_a_sentence(tiny, mess, monkeypatch, flags, words):
    monkeypatch.chdir(mess)
    assert words in complaint(*flags.split(), "--num-workers", 0, program=evaluate)

def test_another_networks_weights_are_refused(mess):
    with pytest.raises(UserError, match="the FID Inception's weights"):
        evaluate.Inception(mess / "vit.pth")


# ---- evaluate.py: demo, bench, comparison ------------------------------------------------------------------

@pytest.fixture
def hasty(tiny, monkeypatch, tmp_path):
    """Two steps of fitting, few letters and two steps of each sampler."""
    letters, fit = evaluate.draw_letters, evaluate.fit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        evaluate, "draw_letters", lambda n, seed: letters(1100 if seed == 2 else 100, seed)
    )
    monkeypatch.setattr(evaluate, "fit", lambda net, loss, data, steps: fit(net, loss, data, 2))
    monkeypatch.setattr(evaluate, "SAMPLE_FLAGS", "--num-steps 2 --cfg-scale 2")
    monkeypatch.setattr(
        evaluate, "MEASURE_FLAGS", "--num-samples 10 --mode heun --num-steps 2 --num-workers 0"
    )
    return "--demo --tau 1 --max-train-steps 2 --checkpointing-steps 1 --sampling-steps 0".split()

def test_the_demo_is_a_row_of_ordinary_commands(hasty, capsys):
    evaluate.demo(hasty)
    printed, home = capsys.readouterr().out, Path("runs/demo")
    programs = [line.split()[2] for line in printed.splitlines() if line.startswith("$ python ")]
    assert programs == "haste.py haste.py evaluate.py evaluate.py haste.py".split()
    assert (printed.count("the classifier reads"), printed.count("\nrecall ")) == (3, 1)
    assert [json.loads(line)["phase"] for line in (home / "metrics.jsonl").open()] == [1, 2]
    assert (home / "demo.png").is_file()

def test_the_comparison_trains_and_measures_each_variant_once(hasty, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "VARIANTS", {"plain": "--tau 0", "HASTE": ""})
    trained = record_calls(monkeypatch, haste, "train")
    evaluate.demo([*hasty, "--compare"])
    # the same command with another seed trains only what is missing
    evaluate.demo([*hasty, "--compare", "--seeds", "2"])
    names = [args.exp_name for args, in trained]
    assert names == [f"compare/seed{seed}/{name}" for seed in (0, 1) for name in ("plain", "HASTE")]
    runs = json.loads(Path("runs/compare/compare.json").read_text())["runs"]
    x = [runs["plain"][seed]["1"][0] for seed in "01"]
    assert f"| 1 | {np.mean(x):.2f} ± {np.std(x, ddof=1):.2f}, " in capsys.readouterr().out
    assert Path("runs/compare/compare.png").is_file() == bool(importlib.util.find_spec("matplotlib"))
    with pytest.raises(UserError, match="other flags"):
        evaluate.demo([*hasty, "--compare", "--learning-rate", "0.1"])


# ---- Slow: python -m pytest -m slow ------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("processes, kills", [(0, 12), (2, 6)])
def test_killed_at_random_instants_the_end_is_the_same_bits(world, tmp_path, processes, kills):
    rng = np.random.default_rng(0)
    more = "--max-train-steps", 60, "--tau", 30, "--checkpointing-steps", 5
    run(line(world, tmp_path / "whole", *more), processes)
    for _ in range(kills):
        process = launch(line(world, tmp_path / "killed", *more), processes)
        time.sleep(rng.uniform(4, 12))
        subprocess.run(["pkill", "-KILL", "-f", tmp_path / "killed"])  # torchrun's processes, too
        process.wait()
    run(line(world, tmp_path / "killed", *more), processes)
    assert same(checkpoint(tmp_path / "whole", 60), checkpoint(tmp_path / "killed", 60))

@pytest.mark.slow
def test_memory_threads_and_open_files_do_not_grow(world, tmp_path):
    more = "--max-train-steps", 3000, "--checkpointing-steps", 500, "--num-workers", 1, "--tau", 1500
    process, seen = launch(line(world, tmp_path, *more), stderr=subprocess.DEVNULL), []
    wait_for_checkpoint(tmp_path, process)
    while process.poll() is None:
        home = Path(f"/proc/{process.pid}")
        with suppress(FileNotFoundError, IndexError):  # as the process ends
            memory = int((home / "status").read_text().split("VmRSS:")[1].split()[0])
            seen.append((memory, *(len(os.listdir(home / kind)) for kind in ("task", "fd"))))
        time.sleep(1)
    early, late = np.median(seen[:10], axis=0), np.median(seen[-10:], axis=0)
    assert process.returncode == 0 and late[0] < 1.1 * early[0]
    assert (late[1:] < early[1:] + 20).all()
