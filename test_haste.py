# SPDX-License-Identifier: MIT
"""What haste.py and evaluate.py promise, in the order of the files. Run: python -m pytest -q

To add a test, copy one whose name says something similar. Most tests need one of these, which come first:
- tiny_model() is a SiT with the sizes of TINY; fixed_normal(seed, ...) are the same numbers everywhere;
- the fixture `dataset` is a folder with images/, data/, which is prepared, and teacher.pt;
- train(dataset, folder, "--flag", value) is a run of six steps on it, three in each phase, in this process;
  checkpoint(folder, step) and metrics(folder, key) read what it wrote; launch and run_program start a program
  in processes of its own;
- complaint("--flag", value) is the sentence with which the command line ends.
Fixtures replace what cannot be downloaded: tiny_inception the Inception, clip CLIP, StubVAE the VAE.

What the tests are held to is not this repository's own output, but

    SiT: model, losses, gradients, samplers     figures of the authors' released HASTE code, and
    MM-DiT                                      the same; both ran once on numpy's fixed random streams
    DiT: loss, gradients, sampler               figures of facebookresearch/DiT, on the same streams
    SiT's own checkpoints                       the forward pass of SiT's code, in sits_own
    DiT's schedule                              Bayes' rule
    L_diff, L_REPA, L_ATTA, all metrics         naive loops over the formulas, in fp64
    samplers, trigger                           models whose exact answer is known
    crop, keys of references, notes             ADM's formulas
    Inception's features                        torch-fidelity: its figures, and itself where it is installed
    Inception's resize                          TensorFlow 1's formula, to the bit
    runs                                        other runs: resumed, in parts, on two processes, compiled
"""
import argparse
import copy
import importlib.util
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import uuid
import weakref
import zlib
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import haste
from haste import UserError

# At these sizes, several threads are slower than one.
torch.set_num_threads(1)

HASTE = str(Path(haste.__file__).resolve())

# A model small enough that a step takes milliseconds, with other numbers of blocks, heads and channels than
# any of the paper's, so that none of them can be a constant in the code.
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
# A teacher of 12 blocks, as DINOv2 has them.
VIT = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 12, "num_heads": 2, "num_classes": 0}
# Most runs here train a SiT-XS, which is made smaller, so that a step takes milliseconds.
haste.CONFIGS["XS"] = haste.Config(
    depth=4, hidden_size=32, num_heads=4, attention_blocks=(1, 2), feature_block=3, projector_dim=16,
    teacher_blocks=(9, 11), tau=3)
# The paper's weights of the terms.
WEIGHTS = {"diff": 1.0, "repa": 0.5, "atta": 0.5}


# ---- Helpers: models and numbers ---------------------------------------------------------------------------

def tiny_model(kind=haste.SiT, **sizes):
    """A model of class `kind` with the sizes of TINY, and the same weights each time."""
    torch.manual_seed(0)
    return kind(**TINY | sizes)


def with_random_weights(model):
    """The model, with random weights where it starts at zero: a new model answers 0 to everything."""
    for p in model.parameters():
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.1)
    return model


def tiny_vit(**sizes):
    """A timm VisionTransformer with the sizes of VIT, and the same weights each time."""
    torch.manual_seed(0)
    # haste.py, too, asks timm for a model that takes images of any size.
    return VisionTransformer(**VIT | {"dynamic_img_size": True} | sizes)


def save_teacher(path, **sizes):
    """Writes a file for --teacher, and returns its path as text."""
    config = VIT | sizes
    torch.save({"config": config, "model": tiny_vit(**config).state_dict()}, path)
    return str(path)


def fixed_normal(seed, *shape):
    """Numbers from N(0, 1) in fp32, the same on every machine: numpy promises that of RandomState."""
    numbers = np.random.RandomState(seed).standard_normal(shape)
    return torch.from_numpy(numbers.astype(np.float32))


def with_fixed_weights(model, without="nothing"):
    """The model, with fixed numbers as its weights; names that begin with `without` keep what they have."""
    state = model.state_dict()
    names = sorted(name for name in state if not name.startswith(without))
    for i, name in enumerate(names):
        if name == "pos_embed":
            continue
        # Scaled by its number of inputs, a matrix keeps activations near 1. Vectors become small numbers.
        inputs = state[name][0].numel() if state[name].ndim > 1 else 2500
        state[name] = fixed_normal(1000 + i, *state[name].shape) * inputs ** -0.5
    model.load_state_dict(state)
    return model


def fix_noise(monkeypatch):
    """Makes each call of torch.randn_like return the next fixed numbers."""
    # The other code was run with the same seeds, one for each step of its sampler.
    seeds = iter(range(501, 600))

    def randn_like(x):
        return fixed_normal(next(seeds), *x.shape).to(x.dtype)

    monkeypatch.setattr(torch, "randn_like", randn_like)


def close_to(value, rel=2e-4):
    """A value to compare with, within what fp32 differs by on another machine."""
    return pytest.approx(value, rel=rel, abs=2e-5)


def assert_gradient_norms(model, expected):
    """Fails if the norm of a parameter's gradient is not the expected one."""
    parameters = dict(model.named_parameters())
    norms = {name: parameters[name].grad.norm().item() for name in expected}
    assert norms == close_to(expected)


def count_parameters(name):
    """The named parameters of a model, and how many numbers they hold without the projector's."""
    # On the meta device, the paper's largest model takes no memory.
    with torch.device("meta"):
        model = haste.build_model(name)
    parameters = dict(model.named_parameters())
    count = sum(p.numel() for key, p in parameters.items() if not key.startswith("projectors"))
    return parameters, count


def equal_states(a, b):
    """True if two nests of dictionaries and tensors agree to the last bit; their "args" may differ."""
    # Two runs have different folders in their "args".
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[key], b[key]) for key in a if key != "args")
    return a == b


# ---- Helpers: what happens inside --------------------------------------------------------------------------

def record_calls(monkeypatch, owner, name):
    """The list to which each call of owner.name will add its arguments."""
    calls = []
    real = getattr(owner, name)

    def record(*args, **options):
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, record)
    return calls


def record_outputs(module):
    """The list to which each call of a module will add its output."""
    outputs = []

    def keep(module, args, output):
        outputs.append(output)

    module.register_forward_hook(keep)
    return outputs


# ---- Helpers: images, datasets and runs --------------------------------------------------------------------

def random_images(n, seed=0, size=(8, 8)):
    """n images of noise, uint8 (n, H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (n, *size, 3), np.uint8)


def to_batch(arrays):
    """Images (n, H, W, 3) -> a tensor (n, 3, H, W)."""
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def write_pngs(folder, arrays):
    """Writes 0000.png, 0001.png, ... and returns the folder."""
    for i, array in enumerate(arrays):
        evaluate.write_png(folder / f"{i:04d}.png", array)
    return folder


def save_images(folder, n=40, classes=4):
    """Writes n images of 9 x 12 into the folders class0, class1, ... in turn, and returns nothing."""
    # They are larger than what the tests prepare, and not square, so that each is resized and cropped.
    for i, array in enumerate(random_images(n, 0, (9, 12))):
        evaluate.write_png(folder / f"class{i % classes}/{i:02d}.png", array)


def to_argv(flags):
    """Flags and their values, each as the text that a command line holds."""
    return [str(flag) for flag in flags]


def parse_flags(line, *more):
    """The values of haste.py's flags, of a line of them and of more."""
    return haste.parse_args(line.split() + to_argv(more))


def prepare(source, out, *more):
    """Prepares images as pixels of 8 x 8, and returns the dataset."""
    line = f"--prepare {source} --data-dir {out} --resolution 8 --vae none --num-workers 0"
    haste.prepare(parse_flags(line, *more))
    return haste.Data(out)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder: 40 small images in 4 classes in images/, prepared in data/, and a teacher in teacher.pt."""
    # Tests only read it, and so it is made once.
    folder = tmp_path_factory.mktemp("dataset")
    save_images(folder / "images")
    prepare(folder / "images", folder / "data")
    save_teacher(folder / "teacher.pt")
    return folder


def run_flags(dataset, out, *more):
    """The command line of a run of 6 steps, 3 in each phase; later flags replace earlier ones."""
    # To start a loader process takes longer than the run, and so does a grid of many steps. Each step has a
    # line of metrics, and the learning rate is high enough for a wrong step to show.
    line = (f"--model SiT-XS/2 --data-dir {dataset}/data --teacher {dataset}/teacher.pt --output-dir {out} "
            "--exp-name run --batch-size 8 --max-train-steps 6 --tau 3 --checkpointing-steps 2 --log-every 1 "
            "--sampling-steps 0 --num-workers 0 --learning-rate 1e-3 --num-steps 2")
    return line.split() + to_argv(more)


def train(dataset, out, *more):
    """The exit code of a run of 6 steps in this process."""
    # A process of its own would import torch first, for some seconds.
    return haste.train(haste.parse_args(run_flags(dataset, out, *more)))


def checkpoints(out):
    """The names of a run's checkpoints, in order."""
    return sorted(path.name for path in Path(out, "run/checkpoints").iterdir())


def checkpoint(out, step):
    """What a run's checkpoint of this step holds."""
    return haste.read_checkpoint(Path(out, f"run/checkpoints/{step:07d}.pt"))


def save_as(state, folder, name="0000000.pt", **options):
    """Saves a checkpoint, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name, **options)
    return folder / name


def metrics(out, key=None):
    """The lines of metrics.jsonl, or, with a key, one value of each line that has it."""
    text = Path(out, "run/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    if key is None:
        return lines
    return [line[key] for line in lines if key in line]


def weight_difference(out, other):
    """The largest difference between the weights that two runs end with."""
    a = checkpoint(out, 6)["model"]
    b = checkpoint(other, 6)["model"]
    return max((a[key] - b[key]).abs().max().item() for key in a)


def complaint(*argv, program=haste):
    """The sentence with which the command line ends."""
    with pytest.raises(SystemExit) as stop:
        program.main(to_argv(argv))
    # Python prints this text, and exits with code 1.
    sentence = str(stop.value)
    assert sentence.startswith("error: ") and "\n" not in sentence
    return sentence


# ---- Helpers: programs in processes of their own -----------------------------------------------------------

@contextmanager
def launch(argv, processes=0, program=HASTE, ignored=(), stderr=subprocess.PIPE, **variables):
    """A program's process while the block lasts: torchrun's for processes > 0; then all of it is killed."""
    command = [sys.executable]
    if processes > 0:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += to_argv([program, *argv])
    # What runs on the CPU can be compared to the last bit. By the mark, kill finds all that belongs to it.
    mark = uuid.uuid4().hex
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HASTE_TEST": mark} | variables

    def set_signals():
        # Under nohup, or in the background of a script, some signals are ignored, and children inherit that.
        for number in haste.STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env,
                               start_new_session=True, preexec_fn=set_signals)
    # Popen's own block closes the pipes at its end.
    with process:
        try:
            yield process
        finally:
            kill(process, mark)


def kill(process, mark):
    """Kills a launched process, and all that it has started."""
    # Of a process that has ended, the number may be another's by now.
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    # torchrun starts each of its workers in a session of its own, and they outlive it. Of all processes, only
    # those of this launch have the mark in their environment.
    for path in Path("/proc").glob("[0-9]*/environ"):
        # A process may just have ended, or be another user's.
        with suppress(OSError):
            if mark.encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


def run_program(argv, processes=0, code=0, **options):
    """What a program prints, (stdout, stderr); it must end with this exit code and without a traceback."""
    with launch(argv, processes, **options) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == code and "Traceback" not in err, err
    return out, err


def wait_for_metrics(out, lines, process):
    """Returns when the run has written so many lines of metrics, and so is in the midst of its loop."""
    # A signal that comes earlier, while Python starts, ends it as it ends any program.
    path = out / "run/metrics.jsonl"
    end = time.time() + 200
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        if process.poll() is not None or time.time() > end:
            process.terminate()
            pytest.fail(f"the run wrote no metrics, and said: {process.communicate(timeout=60)}")
        time.sleep(0.05)


@pytest.fixture
def default_signals():
    """In the test, this process acts on signals as a program at a terminal does."""
    # Under nohup, or in the background of a script, some are ignored, and haste.py leaves these alone.
    before = {}
    for number in haste.STOP_SIGNALS:
        handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        before[number] = signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- 1. The student ----------------------------------------------------------------------------------------
# The same weights give what the released code gives; names and initial weights are SiT's and REPA's.

def released_model():
    """A SiT with fixed weights, of which the figures of the released code are known."""
    sizes = dict(hidden_size=192, depth=10, num_classes=10, teacher_dim=48, projector_dim=96)
    return with_fixed_weights(haste.SiT(**sizes))


def test_losses_and_gradients_are_those_of_the_released_code():
    model = released_model()
    x0 = fixed_normal(1, 2, 4, 32, 32)
    eps = fixed_normal(2, 2, 4, 32, 32)
    t = torch.tensor([0.3, 0.8])
    y = torch.tensor([3, 7])
    features = fixed_normal(3, 2, 256, 48)
    qk = []
    for i in range(4):
        q = fixed_normal(40 + i, 2, 12, 256, 64)
        k = fixed_normal(60 + i, 2, 12, 256, 64)
        qk.append((q, k))
    # The student has 16 heads and the teacher 12, so that four of the student's are not aligned.
    terms = haste.losses(model, model.diffusion, x0, eps, t, y, (features, qk), WEIGHTS)
    assert terms["diff"].item() == close_to(3.124647)
    assert terms["repa"].item() == close_to(-0.002397)
    assert terms["atta"].item() == close_to(5.951766)
    haste.objective(terms, WEIGHTS).backward()
    assert_gradient_norms(model, {
        "blocks.4.attn.qkv.weight": 0.640134,
        "blocks.7.attn.qkv.weight": 0.495325,
        "x_embedder.proj.weight": 0.376411,
        "projectors.0.0.weight": 0.047125,
        "final_layer.linear.weight": 2.75373,
    })


@pytest.mark.parametrize("mode, values, mean", [
    ("ode", [-0.570364, 2.528501, 2.473564, 0.119391], 1.093669),
    ("heun", [-0.494683, 2.502542, 2.412591, 0.107579], 1.086206),
    ("sde", [0.613797, 1.507382, 0.466727, 0.038904], 0.921484),
])
def test_samplers_give_the_figures_of_the_released_code(monkeypatch, mode, values, mean):
    fix_noise(monkeypatch)
    noise = fixed_normal(9, 2, 4, 32, 32)
    y = torch.tensor([3, 7])
    samples = haste.sample(released_model(), noise, y, 6, 1.8, (0.0, 0.7), mode)
    assert samples[1, :, 20, 3].tolist() == close_to(values)
    assert samples.abs().mean().item() == close_to(mean)


def test_parameters_are_those_of_sit_and_repa():
    parameters, count = count_parameters("SiT-XL/2")
    # SiT publishes its XL/2 with twice the output channels.
    assert count == 675_129_632 - 16 * (1152 + 1)
    # Their order counts, too: an optimizer's state has numbers in place of names.
    parts = dict.fromkeys(name.split(".")[0] for name in parameters)
    assert list(parts) == "pos_embed x_embedder t_embedder y_embedder blocks projectors final_layer".split()
    assert not parameters["pos_embed"].requires_grad


def test_new_model_gives_zero_velocity_and_blocks_are_the_identity():
    model = tiny_model()
    x = torch.randn(2, 3, 8, 8)
    assert not model(x, torch.rand(2), torch.tensor([0, 1])).any()
    tokens = torch.randn(2, 16, 32)
    after, _ = model.blocks[0](tokens, torch.randn(2, 32))
    assert torch.equal(after, tokens)


def test_initial_weights_do_not_depend_on_the_teachers_width():
    # Runs with and without a teacher are to be compared from the same start.
    narrow = tiny_model(teacher_dim=24).state_dict()
    wide = tiny_model(teacher_dim=48).state_dict()
    for key, x in narrow.items():
        assert key.startswith("projectors") or torch.equal(x, wide[key])


def test_align_returns_projected_tokens_and_the_maps_that_attention_used(monkeypatch):
    model = with_random_weights(tiny_model())
    attended = record_calls(monkeypatch, F, "scaled_dot_product_attention")     # q, k, v of each block
    # The feature block counts from 1, and this one from 0.
    outputs = record_outputs(model.blocks[2])
    inputs = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 4])
    v, z, qk = model(*inputs, align=True)
    for block, (q, k) in zip((1, 2), qk, strict=True):
        q_used, k_used, _ = attended[block]
        assert torch.equal(q, q_used)
        assert torch.equal(k, k_used)
    tokens, _ = outputs[0]
    assert torch.equal(z, model.projectors[0](tokens))
    assert torch.equal(v, model(*inputs))


def test_queries_and_keys_are_views():
    # Copies of them would cost as much memory as the tokens of a block.
    qkv = torch.randn(2, 5, 24)
    for x in haste.split_heads(qkv, 2):
        assert x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()


# ---- 2. The teacher ----------------------------------------------------------------------------------------
# Features and maps are those that the teacher itself computes, for the hub's DINOv2, timm's ViTs and files.

class MemEffAttention(nn.Module):
    """Attention that forms its maps, as the hub's DINOv2 does without xFormers, and keeps them."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = haste.split_heads(self.qkv(x), self.num_heads)
        self.logits = q @ k.mT / q.shape[-1] ** 0.5
        return self.proj((self.logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


HUB_ATTENTION = MemEffAttention.forward


class Dino(VisionTransformer):
    """Answers as the hub's DINOv2 does: no resampling, registers behind the class token, a dictionary."""

    def __init__(self, registers):
        super().__init__(**VIT | {"img_size": 21, "patch_size": 3})
        self.registers = nn.Parameter(torch.randn(1, registers, 24))
        self.patch_embed.strict_img_size = False
        for block in self.blocks:
            block.attn = MemEffAttention(24, 2)

    def forward_features(self, x):
        class_token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([class_token, self.patch_embed(x)], dim=1) + self.pos_embed
        # Registers have no position, and come between the class token and the patches.
        registers = self.registers.expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        for block in self.blocks:
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        patches = self.norm(x)[:, 1 + registers.shape[1]:]
        return {"x_norm_patchtokens": patches}


@pytest.mark.parametrize("kind", ["dinov2_vitb14", "dinov2_vitb14_reg"])
def test_features_and_maps_are_those_of_the_unpatched_dinov2(kind, monkeypatch):
    torch.manual_seed(0)
    dino = Dino(registers=4 if kind.endswith("_reg") else 0)
    monkeypatch.setattr(torch.hub, "load", lambda repo, name, **options: copy.deepcopy(dino))
    teacher = haste.load_teacher(kind, 7, (7, 9, 11))
    images = to_batch(random_images(2, 0, (20, 20)))
    fused = record_calls(monkeypatch, F, "scaled_dot_product_attention")
    features, qk = teacher(images)
    assert len(fused) == 12
    # The hub's own attention, on the same images.
    monkeypatch.setattr(MemEffAttention, "forward", HUB_ATTENTION)
    x = F.interpolate((images - teacher.mean) / teacher.std, 21, mode="bicubic")
    expected = dino.forward_features(x)["x_norm_patchtokens"]
    assert torch.allclose(features, expected, atol=1e-5)
    for block, (q, k) in zip((7, 9, 11), qk, strict=True):
        # Class and register tokens, which come first, have no partners in the student.
        logits = dino.blocks[block].attn.logits[:, :, -49:, -49:]
        assert torch.allclose(q @ k.mT / q.shape[-1] ** 0.5, logits, atol=1e-5)
    assert not teacher.vit.training
    assert not any(p.requires_grad for p in teacher.parameters())


TEACHERS = {
    "plain": {},
    "with register tokens": {"reg_tokens": 4},
    "whose positions are of patches alone": {"reg_tokens": 4, "no_embed_class": True},
    "without class token": {"class_token": False, "global_pool": "avg"},
    "with norms of q and k": {"qk_norm": True},
}

@pytest.mark.parametrize("name", TEACHERS)
def test_maps_of_a_teachers_file_are_the_ones_that_its_attention_used(name, tmp_path, monkeypatch):
    path = save_teacher(tmp_path / "teacher.pt", img_size=12, **TEACHERS[name])
    saved = torch.load(path)
    for key, x in saved["model"].items():       # norms that do something
        if "q_norm.weight" in key:
            x += torch.rand(x.shape)
    torch.save(saved, path)
    teacher = haste.load_teacher(path, 4, (7, 9, 11))
    attended = record_calls(monkeypatch, F, "scaled_dot_product_attention")     # q, k, v of each block
    normed = record_outputs(teacher.vit.norm)
    features, qk = teacher(to_batch(random_images(2, 0, (20, 20))))
    assert torch.equal(features, normed[0][:, -16:])
    for b, pair in zip((7, 9, 11), qk, strict=True):
        for x, all_tokens in zip(pair, attended[b]):
            assert torch.equal(x, all_tokens[:, :, -16:])


def load_from_timm(monkeypatch, name, blocks=(7, 9, 11)):
    """(Teacher by timm's name, the ViT in it) without the weights, which would be downloaded, and narrower."""
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: real(
        name, embed_dim=24, num_heads=2, **options))
    teacher = haste.load_teacher(name, 4, blocks)
    return teacher, teacher.vit


@pytest.mark.parametrize("name, mean", [
    ("vit_base_patch16_clip_224.openai", 0.48145466),
    ("vit_base_patch16_224.mae", 0.485),
    ("dinov1-vit-b", 0.485),
    ("vit_base_patch16_224.augreg_in21k", 0.5),
])
def test_a_teacher_by_timms_name_has_timms_normalisation_and_its_own_maps(monkeypatch, name, mean):
    teacher, vit = load_from_timm(monkeypatch, name)
    assert teacher.mean.flatten()[0].item() == pytest.approx(255 * mean)
    # Its attention forms the maps when it is not fused.
    maps = []
    for b in (7, 9, 11):
        vit.blocks[b].attn.fused_attn = False
        vit.blocks[b].attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))
    _, qk = teacher(to_batch(random_images(2, 0, (32, 32))))
    for (q, k), whole in zip(qk, maps, strict=True):
        # Without the class token, rows add up to 1 again.
        patches = whole[:, :, 1:, 1:] / whole[:, :, 1:, 1:].sum(-1, keepdim=True)
        assert torch.allclose((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1), patches, atol=1e-5)


def test_a_teacher_whose_maps_are_not_softmax_of_q_k_is_refused(tmp_path, monkeypatch):
    class OtherAttention(nn.Module):
        pass

    vit = tiny_vit()
    vit.blocks[5].attn = OtherAttention()
    monkeypatch.setattr(haste, "VisionTransformer", lambda **config: vit)
    monkeypatch.setattr(vit, "load_state_dict", lambda state: None)
    with pytest.raises(UserError, match="has blocks with OtherAttention, whose maps are not softmax"):
        haste.load_teacher(save_teacher(tmp_path / "teacher.pt"), 4, (7, 9, 11))


def test_repas_names_of_encoders_are_understood(monkeypatch):
    loaded = []
    monkeypatch.setattr(torch.hub, "load", lambda repo, name, **options: loaded.append(name) or Dino(0))
    haste.load_teacher(parse_flags("--enc-type dinov2-vit-b").teacher, 7, ())
    assert loaded == ["dinov2_vitb14"]


def test_a_teacher_that_cannot_be_had_gets_a_sentence(monkeypatch, tmp_path):
    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load", offline)
    monkeypatch.setattr(timm, "create_model", offline)
    for name in ("dinov2_vitb14", "vit_base_patch16_224.mae"):
        with pytest.raises(UserError, match="without internet, .*--teacher FILE .OSError: no route"):
            haste.load_teacher(name, 4, ())
    with pytest.raises(UserError, match="teacher.pt is no dinov2_vit.*, no model of timm, and no file"):
        haste.load_teacher(str(tmp_path / "teacher.pt"), 4, ())


def test_teacher_sees_the_image_normalised_and_bicubic_on_the_students_grid():
    teacher = haste.Teacher(tiny_vit(img_size=12), (), 6)
    seen = []

    def keep_input(module, args):
        seen.append(args[0])

    teacher.vit.patch_embed.register_forward_pre_hook(keep_input)
    images = to_batch(random_images(2, 0, (16, 16)))
    teacher(images)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)        # ImageNet's
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = F.interpolate((images / 255 - mean) / std, 12, mode="bicubic")
    assert torch.allclose(seen[0], expected, atol=1e-5)


def test_a_teacher_file_can_name_its_own_mean_and_std(tmp_path):
    path = save_teacher(tmp_path / "teacher.pt")
    saved = torch.load(path)
    images = to_batch(random_images(2))
    features = []
    for normalisation in ({}, {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}):
        torch.save(saved | normalisation, path)
        teacher = haste.load_teacher(path, 4, ())
        features.append(teacher(images)[0])
    assert not torch.allclose(*features)
    vit = tiny_vit()
    expected = vit.eval().forward_features(images / 127.5 - 1)[:, 1:]
    assert torch.allclose(features[1], expected, atol=1e-4)


@pytest.mark.parametrize("depth, blocks", [(12, [7, 9, 11]), (24, [19, 21, 23])])
def test_teacher_blocks_keep_their_distance_from_the_last(tmp_path, depth, blocks):
    path = save_teacher(tmp_path / "teacher.pt", depth=depth)
    assert haste.load_teacher(path, 4, (7, 9, 11)).blocks == blocks


def test_a_teacher_with_too_few_blocks_is_refused(tmp_path):
    path = save_teacher(tmp_path / "teacher.pt", depth=4)
    # Block 7 of 12 would be -1, the last one.
    with pytest.raises(UserError, match="no teacher block 7: .* count as the last 4 of 12"):
        haste.load_teacher(path, 4, (7, 9, 11))
    assert haste.load_teacher(path, 4, (8, 11)).blocks == [0, 3]


# ---- 3. Diffusion: the flow and its samplers ---------------------------------------------------------------
# Samplers reach the exact answers of models that have one; guidance acts where it is asked to.

class GaussianVelocity(nn.Module):
    """The exact velocity of data from N(0, 1/4): E[eps - x0 | x_t]."""

    diffusion = haste.Flow()
    can_be_guided = True
    guided_channels = 4

    def __init__(self):
        super().__init__()
        # Each evaluation adds its batch size, time and labels.
        self.calls = []

    def null_condition(self, y):
        return torch.full_like(y, 3)

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item(), y.tolist()))
        s = t.view(-1, 1, 1, 1).double()
        covariance = s - (1 - s) / 4                # of eps - x0 and x_t
        variance = (1 - s) ** 2 / 4 + s ** 2        # of x_t
        return (covariance / variance * x).to(x.dtype)


def noise_and_labels(channels, side):
    """Noise for four samples, and their labels, which are 0."""
    return fixed_normal(0, 4, channels, side, side), torch.zeros(4).long()


def test_ode_samplers_turn_noise_into_data():
    noise, y = noise_and_labels(1, 32)
    ode = haste.sample(GaussianVelocity(), noise, y, steps=100, mode="ode")
    heun = haste.sample(GaussianVelocity(), noise, y, steps=100, mode="heun")
    # The flow that takes one Gaussian to another is a scaling.
    exact = 0.5 * noise.double()
    assert (ode - exact).abs().max() < 0.05
    assert (heun - exact).abs().max() < 0.003


def test_sde_sampler_turns_noise_into_data_that_do_not_depend_on_it():
    noise, y = noise_and_labels(1, 32)
    torch.manual_seed(0)
    sde = haste.sample(GaussianVelocity(), noise, y)
    assert sde.std().item() == pytest.approx(0.5, abs=0.02)
    assert sde.dtype == torch.float64
    both = torch.stack([sde.flatten(), noise.flatten()])
    # The ODE's would be 1.
    assert torch.corrcoef(both)[0, 1] < 0.5


def test_sampler_that_the_model_does_not_have_is_refused():
    noise, y = noise_and_labels(1, 32)
    with pytest.raises(UserError, match="no sampler ddpm"):
        haste.sample(GaussianVelocity(), noise, y, mode="ddpm")


@pytest.mark.parametrize("mode, evaluations", [("sde", 6), ("ode", 6), ("heun", 11)])
def test_guidance_doubles_the_batch_only_inside_its_interval(mode, evaluations):
    model = GaussianVelocity()
    haste.sample(model, torch.randn(2, 1, 2, 2), torch.tensor([0, 2]), 6, 2.0, (0.3, 0.7), mode)
    assert len(model.calls) == evaluations
    first_of_step = model.calls[::2] if mode == "heun" else model.calls
    for n, t, labels in first_of_step:
        if 0.3 <= t <= 0.7:
            assert (n, labels) == (4, [0, 2, 3, 3])
        else:
            assert (n, labels) == (2, [0, 2])
    if mode == "heun":
        # The second evaluation of a step keeps the decision of its first, as in the released code.
        for first, second in zip(first_of_step, model.calls[1::2]):
            assert first[0] == second[0]


@pytest.mark.parametrize("mode, steps, interval, guided", [
    ("ode", 10, (0.0, 0.3), 2),
    ("ode", 250, (0.0, 0.58), 145),
    ("ode", 50, (0.3, 1.0), 36),
    ("sde", 250, (0.68, 1.0), 84),
    ("sde", 10, (0.0, 0.36), 4),
    ("sde", 250, (0.0, 0.7), 172),
])
def test_a_bound_of_guidance_on_a_step_falls_as_in_the_released_code(mode, steps, interval, guided):
    """How many evaluations samplers.py of REPA and HASTE guides."""
    model = GaussianVelocity()
    haste.sample(model, torch.randn(1, 1, 2, 2), torch.tensor([0]), steps, 2.0, interval, mode)
    assert sum(n == 2 for n, _, _ in model.calls) == guided


def test_paper_protocol_takes_250_evaluations_from_1_to_004():
    model = GaussianVelocity()
    # These are the defaults.
    haste.sample(model, torch.randn(1, 1, 2, 2), torch.tensor([0]))
    times = [t for _, t, _ in model.calls]
    assert times == pytest.approx(np.linspace(1, 0.04, 250).tolist())


# ---- 4. Alignment: the losses ------------------------------------------------------------------------------
# L_REPA and L_ATTA are their formulas, finite and the same in every precision; terms have weights and names.

def test_feature_loss_is_the_mean_negative_cosine():
    z = torch.randn(2, 3, 5)
    features = torch.randn(2, 3, 5)
    total = 0
    for a, b in zip(z.view(6, 5), features.view(6, 5)):
        total -= a @ b / a.norm() / b.norm()
    assert haste.feature_loss(z, features).item() == pytest.approx(total.item() / 6)


def test_feature_loss_of_large_tokens_in_fp16_does_not_overflow():
    z = torch.randn(2, 3, 5)
    assert haste.feature_loss(1e4 * z.half(), z).item() == pytest.approx(-1, abs=1e-3)


def naive_attention_loss(student, teacher):
    """L_ATTA, map by map, in fp64."""
    terms = []
    for (q, k), (q_t, k_t) in zip(student, teacher):
        heads = min(q.shape[1], q_t.shape[1], 12)
        for head in range(heads):
            logits = q[:, head].double() @ k[:, head].double().mT / math.sqrt(q.shape[3])
            logits_t = q_t[:, head].double() @ k_t[:, head].double().mT / math.sqrt(q_t.shape[3])
            a = logits.softmax(-1)
            a_t = logits_t.softmax(-1)
            terms.append(-(a_t * a.log()).sum(-1).mean())
    # Each pair of blocks has the same number of heads.
    return sum(terms) / len(terms)


@pytest.mark.parametrize("heads, teacher_heads, N", [
    (6, 12, 5),         # more heads in the teacher
    (12, 12, 5),        # as many in both
    (16, 12, 5),        # SiT-XL's: four heads are not aligned
    (16, 16, 5),        # nor with a teacher that has them, too
    (4, 2, 5),          # fewer heads in the teacher
])
def test_attention_loss_is_the_mean_cross_entropy_of_paired_heads(heads, teacher_heads, N):
    torch.manual_seed(0)
    student = []
    teacher = []
    for _ in range(2):
        q, k = torch.randn(2, 2, heads, N, 6, requires_grad=True)
        student.append((q, k))
    for _ in range(2):
        q, k = torch.randn(2, 2, teacher_heads, N, 4)
        teacher.append((q, k))
    loss = haste.attention_loss(student, teacher)
    naive = naive_attention_loss(student, teacher)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    inputs = [*student[0], *student[1]]
    gradients = torch.autograd.grad(loss, inputs)
    naive_gradients = torch.autograd.grad(naive, inputs)
    for a, b in zip(gradients, naive_gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_loss_is_finite_at_logit_gaps_past_100(dtype):
    # log(softmax(x)), as the released code has it, is -inf here, and its gradient NaN.
    q = torch.full((1, 1, 2, 1), 300, dtype=dtype, requires_grad=True)
    k = torch.tensor([1, 0], dtype=dtype).view(1, 1, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = haste.attention_loss([(q, k)], [(q.detach(), k.flip(2))])
    loss.backward()
    # Student and teacher want opposite tokens, by 300: the cross-entropy is the gap itself.
    assert loss.dtype == torch.float32
    assert loss.item() == 300
    assert q.grad.isfinite().all()


def test_attention_loss_is_the_same_inside_autocast():
    torch.manual_seed(0)
    student, teacher = [[tuple(torch.randn(2, 2, 4, 9, 8).bfloat16())] for _ in range(2)]
    outside = haste.attention_loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert haste.attention_loss(student, teacher) == outside


def test_only_one_pairs_maps_are_in_memory_at_a_time():
    student = [tuple(torch.randn(2, 1, 4, 64, 8, requires_grad=True)) for _ in range(3)]
    teacher = [tuple(torch.randn(2, 1, 4, 64, 8)) for _ in range(3)]
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = haste.attention_loss(student, teacher)
    # What the backward pass needs is queries and keys, and no map of 64 x 64.
    assert max(kept) < 4 * 64 * 64
    loss.backward()


@torch.no_grad()
def test_diffusion_loss_by_hand_and_terms_of_weight_0_left_out():
    model = with_random_weights(tiny_model())
    x0, eps = torch.randn(2, 2, 3, 8, 8)
    t = torch.tensor([0.25, 0.75])
    y = torch.tensor([1, 2])
    s = t.view(2, 1, 1, 1)
    v = model((1 - s) * x0 + s * eps, t, y)
    naive = (v - eps + x0).square().mean().item()
    teacher = haste.Teacher(tiny_vit(), (1, 2), 4)
    target = teacher(to_batch(random_images(2)))

    def terms(target, **weights):
        return haste.losses(model, model.diffusion, x0, eps, t, y, target, WEIGHTS | weights)

    whole = terms(target)
    assert list(whole) == ["diff", "repa", "atta"]
    assert whole["diff"].item() == pytest.approx(naive)
    assert haste.objective(whole, WEIGHTS) == whole["diff"] + 0.5 * whole["repa"] + 0.5 * whole["atta"]
    assert list(terms(None)) == ["diff"]
    assert list(terms(target, repa=0)) == ["diff", "atta"]
    assert list(terms(target, atta=0)) == ["diff", "repa"]


# ---- 5. Termination: the trigger ---------------------------------------------------------------------------
# The cosine is that of the mean gradients of the feature block, over all images.

class OneWeight(nn.Module):
    """v = w everywhere, z = (w, 1): with features (1, 0), alignment wants a larger w, L_diff w = eps - x0."""

    diffusion = haste.Flow()
    feature_block = 2

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 1), nn.Linear(1, 1, bias=False)])
        nn.init.ones_(self.blocks[1].weight)

    def forward(self, x, t, y, align=False):
        w = self.blocks[1].weight.view(())
        v = w.expand_as(x)
        z = torch.stack([w, torch.ones(())]).expand(len(x), 1, 2)
        return v, z, []


@pytest.mark.parametrize("wish, cosine", [(2.0, 1.0), (0.0, -1.0)])
def test_gradients_of_alignment_and_denoising(wish, cosine):
    x0 = torch.zeros(3, 1, 2, 2)
    features = torch.tensor([1.0, 0.0]).expand(3, 1, 2)
    t = torch.full((3,), 0.5)
    y = torch.zeros(3).long()
    weights = {"diff": 1, "repa": 0.5, "atta": 0}
    align, denoise = haste.gradients(OneWeight(), x0, x0 + wish, t, y, (features, []), weights)
    assert F.cosine_similarity(align, denoise, dim=0).item() == pytest.approx(cosine)
    # L_diff is (w - wish)^2 at w = 1.
    assert denoise.item() == pytest.approx(2 * (1 - wish))


def test_trigger_averages_gradients_over_images_and_runs_the_teacher_once_each(dataset, monkeypatch):
    data = haste.Data(dataset / "data")
    data.with_images = True
    seen = []

    def teacher(images):
        seen.append(len(images))

    def gradients(*args):
        # The two parts disagree. A mean of their cosines would be 0, that of the gradients is -1.
        denoise = 1.0 if len(seen) == 1 else second
        return torch.tensor([[1.0], [denoise]])

    monkeypatch.setattr(haste, "gradients", gradients)
    second = -9.0
    args = parse_flags("--tau-images 10")
    cosines = haste.measure_cosines(OneWeight(), teacher, data, args, step=0, size=5)
    assert cosines == [-1.0] * 4
    assert seen == [5, 5]
    # A part counts by its images: 4 * (1, 1) and 1 * (1, -2) make (5, 2), which agree.
    seen.clear()
    second = -2.0
    args = parse_flags("--tau-images 5")
    assert haste.measure_cosines(OneWeight(), teacher, data, args, step=0, size=4) == [1.0] * 4
    assert seen == [4, 1]


# ---- 6. Data -----------------------------------------------------------------------------------------------
# Randomness is a function of seed, step and position; crops are ADM's; bad data are refused.

def test_order_is_one_permutation_after_another_on_any_number_of_processes():
    def indices(rows):
        return list(haste.batch_indices(10, 3, 6, rows, range(5)))

    whole = []
    for batch in indices(slice(0, 6)):
        whole += batch
    first = whole[:10]
    second = whole[10:20]
    # 10 images in batches of 6: an epoch ends inside a batch.
    assert sorted(first) == list(range(10))
    assert sorted(second) == list(range(10))
    assert first != second
    joined = []
    for a, b in zip(indices(slice(0, 3)), indices(slice(3, 6)), strict=True):
        joined += a + b
    assert joined == whole


def test_noise_is_a_function_of_seed_and_step():
    shape = (1, 2, 2)
    t, u, eps, xi = haste.randomness(8, shape, 0, 5)
    again = haste.randomness(8, shape, 0, 5)
    of_next_step = haste.randomness(8, shape, 0, 6)
    for x, same, other in zip((t, u, eps, xi), again, of_next_step, strict=True):
        assert torch.equal(x, same)
        assert not torch.equal(x, other)
    assert 0 <= t.min() and t.max() < 1
    assert not torch.equal(eps, xi)


def test_crop_is_adms():
    image = Image.fromarray(random_images(1, 0, (64, 96))[0])
    # Two halvings by averages, and the rest by BICUBIC; then the centre of the longer side.
    halved_twice = image.resize((48, 32), Image.BOX).resize((24, 16), Image.BOX)
    expected = np.asarray(halved_twice.resize((22, 15), Image.BICUBIC))
    assert np.array_equal(haste.center_crop(image, 15), expected[:, 3:18])


def test_exif_orientation_is_heeded():
    image = Image.fromarray(random_images(1, 0, (2, 4))[0])
    # This orientation is a turn by 90 degrees.
    image.getexif()[0x0112] = 6
    # The image was 4 wide and 2 high.
    assert haste.to_rgb(image).size == (2, 4)


@pytest.mark.parametrize("mode, dtype", [("I;16", np.uint16), ("I", np.int32), ("F", np.float32)])
def test_images_of_more_than_8_bits_are_refused(mode, dtype):
    # Pillow's own conversion cuts all levels above 255 off.
    with pytest.raises(UserError, match=f"mode {mode} has more than 8 bits"):
        haste.to_rgb(Image.fromarray(np.array([[0, 257, 65535]], dtype)))


def test_prepare_writes_repas_layout_and_names_the_images_that_it_skips(tmp_path, capsys):
    source = tmp_path / "source"
    save_images(source, 200)
    (source / "class1/broken.png").write_bytes(b"no image")
    data = prepare(source, tmp_path / "data")
    assert data.classes == ["class0", "class1", "class2", "class3"]
    assert np.bincount(data.labels).tolist() == [50, 50, 50, 50]
    assert data.names[0] == "00000/img00000000.png"
    printed = "".join(capsys.readouterr())
    for words in ("skipping", "class1/broken.png", "1 could not be read", "class0, class1"):
        assert words in printed


def test_a_folder_that_is_not_there_or_has_no_classes_gets_a_sentence(tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.png").touch()
    for name in ("flat", "nowhere"):
        flags = f"--prepare {tmp_path}/{name} --data-dir {tmp_path}/data --vae none"
        assert "must name a folder with one folder of images for each class" in complaint(*flags.split())
    assert "nowhere/images/dataset.json does not exist" in complaint("--data-dir", "nowhere")


def test_interrupted_prepare_resumes_and_ends_the_same(dataset, tmp_path, monkeypatch):
    real = haste.Crops.__getitem__
    done = []

    def crop(self, i):
        done.append(i)
        if len(done) == 34:
            raise KeyboardInterrupt
        return real(self, i)

    monkeypatch.setattr(haste.Crops, "__getitem__", crop)
    with pytest.raises(KeyboardInterrupt):
        prepare(dataset / "images", tmp_path / "data")
    with pytest.raises(UserError, match="is not a prepared dataset"):
        haste.Data(tmp_path / "data")
    resumed = prepare(dataset / "images", tmp_path / "data")
    # What was written is not written again.
    assert len(done) == 34 + 7
    whole = haste.Data(dataset / "data")
    for i in range(40):
        assert torch.equal(resumed[i]["image"], whole[i]["image"])
    with pytest.raises(UserError, match="was begun with other images, another --resolution or another --vae"):
        prepare(dataset / "images", tmp_path / "data", "--resolution", 16)
    # As many images, one of them another: the labels could be those of the wrong ones.
    shutil.copytree(dataset / "images", tmp_path / "images")
    (tmp_path / "images/class0/00.png").rename(tmp_path / "images/class3/new.png")
    with pytest.raises(UserError, match="was begun with other images"):
        prepare(tmp_path / "images", tmp_path / "data")


class StubVAE(nn.Module):
    """Its latents are every second pixel, with a std of 0.1."""

    config = types.SimpleNamespace(scaling_factor=0.5)

    def encode(self, x):
        mean = x[:, :, ::2, ::2]
        latent = types.SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.1))
        return types.SimpleNamespace(latent_dist=latent)


@pytest.fixture(scope="module")
def latents(dataset):
    """The folder of the dataset's images, prepared with a VAE."""
    def load_vae(name):
        return StubVAE()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(haste, "load_vae", load_vae)
        prepare(dataset / "images", dataset / "latents", "--vae", "stub")
    return dataset / "latents"


def test_latents_are_mean_and_std_and_x0_is_drawn_from_them(latents):
    data = haste.Data(latents)
    assert data.shape == (3, 4, 4)
    batch = haste.default_collate([data[i] for i in range(4)])
    # Images are read only while they are needed, in phase I.
    assert "image" not in batch
    assert batch["moments"].shape == (4, 6, 4, 4)
    mean = batch["moments"][:, :3]
    xi = torch.randn(4, 3, 4, 4)
    assert torch.allclose(data.x0(batch, xi), 0.5 * (mean + 0.1 * xi), atol=1e-6)
    data.with_images = True
    pixels = data[0]["image"][:, ::2, ::2] / 127.5 - 1
    assert torch.allclose(pixels, data[0]["moments"][:3], atol=1e-6)


def test_labels_of_the_images_are_written_beside_latents_for_repas_encode(latents):
    of_images, of_latents = [
        json.loads((latents / folder / "dataset.json").read_text()) for folder in ("images", "vae-sd")]
    assert of_images["labels"][7] == ["00000/img00000007.png", 0]
    assert of_latents["labels"][7] == ["00000/img-mean-std-00000007.npy", 0]
    assert [label for _, label in of_images["labels"]] == [label for _, label in of_latents["labels"]]


def repa_folder(folder, labels, channels=4):
    """Writes a dataset of latents as REPA's preprocessing does, and returns nothing."""
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(len(labels))]
    (folder / "vae-sd/00000").mkdir(parents=True)
    for name in names:
        np.save(folder / "vae-sd" / name, np.ones((2 * channels, 8, 8), np.float32))
    listing = {"labels": list(zip(names, labels))}
    (folder / "vae-sd/dataset.json").write_text(json.dumps(listing))


def test_repas_dataset_trains_as_it_is(dataset, tmp_path):
    repa_folder(tmp_path, [0, 2, 1] * 4)
    data = haste.Data(tmp_path)
    assert data.vae == haste.VAE_ENCODER
    assert data.scale == 0.18215
    assert data.classes == ["0", "1", "2"]
    assert train(dataset, tmp_path, "--data-dir", tmp_path, "--tau", 0, "--max-train-steps", 1) == 0


@pytest.mark.parametrize("labels", [[0, 1, 3], [1, 2, 3], [-1, 0, 1]])
def test_labels_with_gaps_are_refused(tmp_path, labels):
    # The null label is the number of classes; with a gap it would be a class.
    repa_folder(tmp_path, labels)
    with pytest.raises(UserError, match="labels must be 0 to K - 1 without gaps"):
        haste.Data(tmp_path)


def test_images_and_latents_are_paired_by_their_sorted_listings(tmp_path):
    # One image was damaged, so that the images' numbers have a gap; REPA's encode counts without it.
    repa_folder(tmp_path, [0, 0, 0, 1, 1])
    of_images = []
    for number in (0, 1, 2, 4, 5):
        name = f"00000/img{number:08d}.png"
        evaluate.write_png(tmp_path / "images" / name, np.full((8, 8, 3), number, np.uint8))
        of_images.append([name, number // 3])
    (tmp_path / "images/dataset.json").write_text(json.dumps({"labels": of_images}))
    data = haste.Data(tmp_path)
    data.with_images = True
    assert [data[i]["image"][0, 0, 0].item() for i in range(5)] == [0, 1, 2, 4, 5]
    # An image more than latents would pair each with its neighbour's.
    of_images.insert(3, ["00000/img00000003.png", 1])
    (tmp_path / "images/dataset.json").write_text(json.dumps({"labels": of_images}))
    with pytest.raises(UserError, match="do not list the same items"):
        haste.Data(tmp_path)


@pytest.mark.parametrize("value", [-20, math.nan])
def test_latents_whose_std_is_a_logarithm_or_that_are_not_finite_are_refused(latents, tmp_path, value):
    shutil.copytree(latents, tmp_path / "data")
    path = tmp_path / "data/vae-sd/00000/img-mean-std-00000000.npy"
    moments = np.load(path)
    moments[len(moments) // 2:] = value
    np.save(path, moments)
    with pytest.raises(UserError, match="00000000.npy must hold mean and std: they must be finite, and std"):
        haste.Data(tmp_path / "data")


def test_a_dataset_that_is_not_complete_is_not_trained_on_as_pixels(latents, tmp_path):
    shutil.copytree(latents, tmp_path / "data")
    (tmp_path / "data/vae-sd/dataset.json").unlink()
    with pytest.raises(UserError, match="vae-sd/dataset.json does not exist, so .* not a complete one"):
        haste.Data(tmp_path / "data")


def test_labels_are_dropped_at_the_rate_of_cfg_prob(dataset):
    data = haste.Data(dataset / "data")
    batch = {"y": torch.ones(20_000).long()}
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = data.condition(batch, u, 0.1).bincount().tolist()
    # Label 4 is the null label.
    assert counts == pytest.approx([0, 18_000, 0, 0, 2000], abs=200)
    assert torch.equal(data.condition(batch, u, 0.0), batch["y"])


# ---- 7. Checkpoints and VAEs -------------------------------------------------------------------------------
# Checkpoints of HASTE, REPA, DiT and SiT load; torn or foreign files are never used in silence.

@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """The output folder of a run through both phases, with two grids."""
    out = tmp_path_factory.mktemp("trained")
    train(dataset, out, "--sampling-steps", 5, "--cfg-prob", 0.5)
    return out


# What other trainers write, as changes of what ours does.

def bare_weights(saved):
    return saved["ema"]


def weights_of_ddp(saved):
    for key in ("model", "ema"):
        saved[key] = {f"module.{name}": x for name, x in saved[key].items()}
    return saved


def compiled_weights(saved):
    for key in ("model", "ema"):
        saved[key] = {name.replace("blocks.", "blocks._orig_mod."): x for name, x in saved[key].items()}
    return saved


def without_args(saved):
    return saved | {"args": None}


def without_ema(saved):
    return saved | {"ema": None, "opt": None}


def without_projector(saved):
    for key in ("model", "ema"):
        saved[key] = {name: x for name, x in saved[key].items() if not name.startswith("projectors")}
    return saved


def args_as_namespace(saved):
    saved["args"] = argparse.Namespace(**saved["args"])
    return saved


NO_OPTIMIZER = "has no optimizer for this run's projector: the optimizer's state starts from 0"

@pytest.mark.parametrize("change, words", [
    (bare_weights, NO_OPTIMIZER),
    (weights_of_ddp, ""),
    (compiled_weights, ""),
    (without_args, ""),
    (without_ema, NO_OPTIMIZER),
    (without_projector, NO_OPTIMIZER),
    (args_as_namespace, ""),
])
def test_other_trainers_checkpoints_load_for_sampling_and_as_a_start(
        dataset, trained, tmp_path, capsys, change, words):
    saved = checkpoint(trained, 6) | {"args": {"model": "SiT-XS/2", "num_classes": 4}}
    expected = saved["model" if change is without_ema else "ema"]
    path = save_as(change(saved), tmp_path / "run/checkpoints")

    # Samples come from its EMA.
    model, args = haste.load_ema(path, "SiT-XS/2")
    for key, x in model.state_dict().items():
        if not key.startswith("projectors"):
            assert torch.equal(x, expected[key])
    assert args["vae"] == haste.VAE_ENCODER
    assert model.num_classes == 4

    # A run starts from it at step 0, as its name says, whatever step is stored in it.
    assert train(dataset, tmp_path, "--max-train-steps", 1) == 0
    assert metrics(tmp_path, "step") == [1]
    printed = capsys.readouterr().out
    assert words in printed
    assert ("starts from 0" in printed) == (words != "")


def test_checkpoint_with_unknown_weights_is_refused_with_the_first_of_them(trained, tmp_path):
    state = checkpoint(trained, 6)["ema"] | {"blocks.0.attn.q_norm.w": torch.ones(3)}
    # To leave such a weight out would be to sample from another model.
    with pytest.raises(UserError, match="is of another model or dataset.*blocks.0.attn.q_norm.w"):
        haste.load_ema(save_as(state, tmp_path), "SiT-XS/2")


@pytest.mark.parametrize("key", ["projectors.1.0.weight", "projectors.0.0.weight"])
def test_samples_need_no_projector_of_a_known_shape(trained, tmp_path, key):
    # REPA with two teachers has two projectors; others have projectors of another width.
    state = checkpoint(trained, 6)["ema"]
    model, _ = haste.load_ema(save_as(state | {key: torch.ones(3)}, tmp_path), "SiT-XS/2")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in state.items() if "projectors" not in name)


def test_weights_without_args_need_a_model(trained, tmp_path):
    path = save_as(checkpoint(trained, 6)["ema"], tmp_path)
    draw = ["--sample", path, "--num-steps", 2, "--out", tmp_path / "grid.png"]
    assert "does not name its model: use --model" in complaint(*draw)
    assert "is of another model" in complaint(*draw, "--model", "SiT-S/2")
    assert isinstance(haste.load_ema(path, "SiT-XS/2")[0], haste.SiT)


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("true",)


def test_nothing_in_a_checkpoint_is_unpickled_and_its_type_is_named(tmp_path):
    path = save_as({"model": {}, "args": Payload()}, tmp_path)
    with pytest.raises(UserError, match="cannot be read as a checkpoint .*posix.system"):
        haste.read_checkpoint(path, "SiT-XS/2")


def sits_own(model, x, t, y):
    """SiT's velocity in its own time, which is the first C of the 2C output channels of its weights."""
    angles = t[:, None] * haste.frequencies()
    embedded = model.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
    c = embedded + model.y_embedder(y)
    tokens = model.x_embedder(x) + model.pos_embed
    for block in model.blocks:
        tokens, _ = block(tokens, c)
    both = haste.unpatchify(model.final_layer(tokens, c), 2)
    return both[:, :x.shape[1]]


def save_sits_own(folder):
    """(model, path) of a checkpoint with SiT's own convention, as a start for a run."""
    torch.manual_seed(0)
    model = haste.build_model("SiT-XS/2", input_size=8, in_channels=3, num_classes=4, out_channels=6)
    with_random_weights(model)
    state = {key: x for key, x in model.state_dict().items() if not key.startswith("projectors")}
    args = argparse.Namespace(model="SiT-XS/2", path_type="Linear", prediction="velocity", vae="ema")
    return model, save_as({"ema": state, "args": args}, folder / "run/checkpoints")


@torch.no_grad()
def test_sits_own_checkpoints_are_converted_exactly(tmp_path):
    # Time, sign and channels differ; what is converted must give the same velocity at any time.
    theirs, path = save_sits_own(tmp_path)
    ours, _ = haste.load_ema(path)
    x = torch.randn(3, 3, 8, 8)
    t = torch.rand(3)
    y = torch.tensor([0, 1, 4])
    # SiT's time runs from noise to data, so that its velocity has the other sign.
    expected = -sits_own(theirs, x, 1 - t, y)
    assert torch.allclose(ours(x, t, y), expected, atol=2e-5)
    assert expected.abs().max() > 0.1
    # SiT's code guides the first three channels.
    assert ours.guided_channels == 3


def sit_weights(outputs):
    """SiT's own model of depth 2 and width 48, with fixed weights in the order of its names."""
    torch.manual_seed(0)
    model = haste.SiT(input_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=5,
                      attention_blocks=(0,), feature_block=1, out_channels=outputs)
    state = {key: x for key, x in model.state_dict().items() if not key.startswith("projectors")}
    for i, name in enumerate(sorted(state)):
        x = state[name]
        if name != "pos_embed":
            scale = x[0].numel() ** -0.5 if x.ndim > 1 else 0.02
            state[name] = scale * fixed_normal(1000 + i, *x.shape)
    return state


def test_sits_own_weights_sample_with_guidance_as_its_code_does(tmp_path, monkeypatch):
    """Ten Euler steps with guidance 1.8 of willisma/SiT, which learns sigma: 8 outputs for 4 channels."""
    config = haste.CONFIGS["XS"]._replace(depth=2, hidden_size=48, num_heads=4)
    monkeypatch.setitem(haste.CONFIGS, "XS", config)
    args = argparse.Namespace(model="SiT-XS/2", path_type="Linear", prediction="velocity", num_classes=5)
    model, _ = haste.load_ema(save_as({"ema": sit_weights(8), "args": args}, tmp_path))
    assert model.guided_channels == 3
    noise = fixed_normal(9, 2, 4, 8, 8)
    x = haste.sample(model, noise, torch.tensor([3, 1]), steps=10, cfg_scale=1.8, mode="ode")
    assert x[1, :, 5, 3].tolist() == close_to([-2.112386, 3.501110, -2.839827, 0.336502])
    assert x.abs().mean().item() == close_to(1.099462)


def test_sits_own_checkpoints_start_a_run(dataset, tmp_path):
    save_sits_own(tmp_path)
    assert train(dataset, tmp_path) == 0
    assert metrics(tmp_path, "step") == [1, 2, 3, 4, 5, 6]


def test_weights_of_sits_shapes_are_a_dits_under_a_dits_name(tmp_path):
    model, _ = save_sits_own(tmp_path)
    # DiT's own checkpoints hold nothing but weights: these must not be converted.
    state = {key: x for key, x in model.state_dict().items() if not key.startswith("projectors")}
    loaded, _ = haste.load_ema(save_as(state, tmp_path, "dit.pt"), "DiT-XS/2")
    assert isinstance(loaded, haste.DiT)
    assert equal_states(state, {key: x for key, x in loaded.state_dict().items() if key in state})


def test_a_torn_newest_checkpoint_is_passed_over_by_name(dataset, trained, tmp_path, capsys):
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    newest = (trained / "run/checkpoints/0000006.pt").read_bytes()
    shutil.copy(trained / "run/checkpoints/0000004.pt", folder)
    (folder / "0000006.pt").write_bytes(newest[:len(newest) // 2])
    (folder / "0000008.pt.part").write_bytes(b"what a killed save left")
    (folder / "best.pt").write_text("not a checkpoint of a run")
    # The run goes on from step 4, and ends with the same bits.
    train(dataset, tmp_path, "--cfg-prob", 0.5)
    assert f"{folder}/0000006.pt is damaged, and is not used" in capsys.readouterr().out
    assert checkpoints(tmp_path) == ["0000004.pt", "0000006.pt", "best.pt"]
    assert equal_states(checkpoint(tmp_path, 6), checkpoint(trained, 6))


def test_run_whose_checkpoints_are_all_damaged_is_not_started_over(dataset, tmp_path):
    # To start over would overwrite what might still be saved by hand.
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/0000004.pt").write_bytes(b"PK cut")
    with pytest.raises(UserError, match="all checkpoints in .* are damaged"):
        train(dataset, tmp_path)
    assert checkpoints(tmp_path) == ["0000004.pt"]


def test_real_vae_is_loaded_and_decodes(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    diffusers.AutoencoderKL(block_out_channels=[32], latent_channels=4).save_pretrained(tmp_path)
    vae = haste.load_decoder("any", str(tmp_path))
    assert haste.to_images(torch.randn(2, 4, 8, 8), vae, 0.2).dtype == torch.uint8


def test_a_vae_that_cannot_be_had_gets_a_sentence(tmp_path):
    with pytest.raises(UserError, match="could not be loaded: it is a name or a folder of diffusers'"):
        haste.load_vae(str(tmp_path / "nowhere"))


def test_pixels_are_clamped_and_truncated_as_in_the_paper():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 2.0]).view(5, 1, 1, 1)
    assert haste.to_images(x, None, 1.0).flatten().tolist() == [0, 0, 127, 254, 255]


def test_samples_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="the samples are not finite"):
        haste.to_images(torch.full((1, 3, 2, 2), math.nan), None, 1.0)


# ---- 8. Training: the two phases ---------------------------------------------------------------------------
# After tau nothing of phase I runs; a run that is resumed, or taken in parts, ends as the whole one.

def test_run_through_both_phases_leaves_checkpoints_metrics_and_grids(trained):
    # Every second step, at tau, and at the end.
    assert checkpoints(trained) == ["0000002.pt", "0000003.pt", "0000004.pt", "0000006.pt"]
    assert metrics(trained, "phase") == [1, 1, 1, 2, 2, 2]
    for line in metrics(trained):
        total = line["loss_diff"] + 0.5 * line.get("loss_repa", 0) + 0.5 * line.get("loss_atta", 0)
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        # What is not computed is no number.
        assert ("loss_atta" in line) == ("loss_repa" in line) == (line["phase"] == 1)
        assert line["images_per_sec"] > 0
    # Grids at tau and at the end, beside those of --sampling-steps.
    grids = sorted(path.name for path in (trained / "run/samples").iterdir())
    assert grids == ["0000003.png", "0000005.png", "0000006.png"]
    assert checkpoint(trained, 6)["args"]["classes"][3] == "class3"


def test_nothing_of_phase_one_runs_after_tau(dataset, latents, tmp_path, monkeypatch):
    images = record_calls(monkeypatch, Image, "open")
    attention = record_calls(monkeypatch, haste, "attention_loss")
    alive = []
    real_losses = haste.losses

    def losses(*args):
        alive.append(teacher and teacher[0][0]() is not None)
        return real_losses(*args)

    def forward(self, images, real=haste.Teacher.forward):
        teacher.append((weakref.ref(self), images))
        return real(self, images)

    teacher = []
    monkeypatch.setattr(haste.Teacher, "forward", forward)
    monkeypatch.setattr(haste, "losses", losses)
    train(dataset, tmp_path, "--data-dir", latents)
    assert alive == [True, True, True, False, False, False]
    assert len(teacher) == 3
    assert len(images) == 3 * 8
    assert len(attention) == 3
    # After tau, the projector stays as it is, and all else is trained.
    before = checkpoint(tmp_path, 3)
    after = checkpoint(tmp_path, 6)
    for key in after["model"]:
        stays = key.startswith("projectors") or key == "pos_embed"
        assert torch.equal(before["model"][key], after["model"][key]) == stays
    # Phase II needs no images.
    shutil.copytree(latents, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/images")
    assert train(dataset, tmp_path, "--data-dir", tmp_path / "data", "--max-train-steps", 7) == 0


def test_tau_0_never_loads_a_teacher(dataset, tmp_path):
    train(dataset, tmp_path / "plain", "--tau", 0, "--teacher", "no such teacher")
    with pytest.raises(UserError, match="no such teacher"):
        train(dataset, tmp_path / "aligned", "--teacher", "no such teacher")


def test_each_step_has_its_own_times_and_noise(dataset, tmp_path, monkeypatch):
    calls = record_calls(monkeypatch, haste, "randomness")
    train(dataset, tmp_path, "--seed", 7)
    assert [key for _, _, *key in calls] == [[7, step] for step in range(6)]


def test_lambda_a_0_is_repa(dataset, tmp_path, monkeypatch):
    # To call it would be an error.
    monkeypatch.setattr(haste, "attention_loss", None)
    train(dataset, tmp_path, "--tau", "never", "--lambda-a", 0, "--max-train-steps", 1)
    assert metrics(tmp_path, "loss_repa") and not metrics(tmp_path, "loss_atta")


def test_tau_is_announced_and_the_end_names_the_next_command(dataset, tmp_path, capsys):
    train(dataset, tmp_path)
    printed = capsys.readouterr().out
    assert f"step 3 is tau: phase II begins, without alignment; {tmp_path}/run/checkpoints has" in printed
    assert f"finished at step 6; see python haste.py --sample {tmp_path}/run" in printed
    # There is nothing left to do.
    assert train(dataset, tmp_path, "--max-train-steps", 5) == 0
    assert "finished at step 6" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [
    "--precision=fp32",
    "--precision=fp16",
    "--precision=bf16",
    "--gradient-accumulation-steps=2",
    "--model=DiT-XS/2",
])
def test_resume_is_bit_exact(dataset, tmp_path, flag):
    train(dataset, tmp_path / "whole", flag)
    # It stops before, at and after tau.
    for stop in (2, 3, 4, 6):
        train(dataset, tmp_path / "stopped", flag, "--max-train-steps", stop)
    assert equal_states(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "stopped", 6))


def test_accumulation_equals_one_batch(dataset, tmp_path):
    train(dataset, tmp_path / "one", "--gradient-accumulation-steps", 1)
    train(dataset, tmp_path / "four", "--gradient-accumulation-steps", 4)
    # The losses would not show a wrong weight of the parts; the norm of the gradient does.
    one = metrics(tmp_path / "one", "grad_norm")
    four = metrics(tmp_path / "four", "grad_norm")
    assert one == pytest.approx(four, rel=1e-3)


def test_ema_starts_at_the_initial_weights_and_follows(dataset, tmp_path):
    train(dataset, tmp_path, "--ema-decay", 0.5, "--max-train-steps", 2, "--checkpointing-steps", 1)
    # The initial weights are those of the run's seed, 0.
    torch.manual_seed(0)
    model = haste.build_model("SiT-XS/2", input_size=8, in_channels=3, num_classes=4, teacher_dim=24)
    ema = model.state_dict()
    for step in (1, 2):
        saved = checkpoint(tmp_path, step)
        ema = {key: (x + saved["model"][key]) / 2 for key, x in ema.items()}
        for key, x in ema.items():
            assert torch.allclose(saved["ema"][key], x, atol=1e-6)


@pytest.mark.parametrize("asked_for, used", [(0.1, 0.1), (0, math.inf)])
def test_gradients_are_clipped_to_the_norm_asked_for(dataset, tmp_path, monkeypatch, asked_for, used):
    calls = record_calls(monkeypatch, nn.utils, "clip_grad_norm_")
    train(dataset, tmp_path, "--max-grad-norm", asked_for, "--max-train-steps", 1)
    assert [norm for _, norm in calls] == [used]


def poison(monkeypatch, value, only=None):
    """Multiplies L_diff of the step that comes as number `only`, or of each, by `value`."""
    real = haste.losses
    steps = []

    def losses(*args):
        steps.append(len(steps) + 1)
        terms = real(*args)
        if only in (None, steps[-1]):
            terms["diff"] = terms["diff"] * value
        return terms

    monkeypatch.setattr(haste, "losses", losses)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_step_that_is_not_finite_is_skipped(dataset, tmp_path, monkeypatch, precision):
    poison(monkeypatch, math.nan, only=3)
    train(dataset, tmp_path, "--precision", precision, "--checkpointing-steps", 1, "--tau", 0)
    before = checkpoint(tmp_path, 2)
    after = checkpoint(tmp_path, 3)
    # Neither weights nor AdamW's averages take part in the step, and the next one is taken.
    assert equal_states(before["model"], after["model"])
    assert equal_states(before["opt"], after["opt"])
    assert not equal_states(after["model"], checkpoint(tmp_path, 4)["model"])
    assert metrics(tmp_path, "skipped_steps") == [0, 0, 1, 0, 0, 0]
    # The skipped step has a line, but no losses in it.
    assert metrics(tmp_path, "step") == [1, 2, 3, 4, 5, 6]
    assert ["loss" in line for line in metrics(tmp_path)] == [True, True, False, True, True, True]


def test_means_of_a_logging_window_are_of_the_steps_that_were_taken(dataset, tmp_path, monkeypatch):
    poison(monkeypatch, math.nan, only=1)
    train(dataset, tmp_path, "--tau", 0, "--log-every", 3)
    assert metrics(tmp_path, "step") == [3, 6]
    assert metrics(tmp_path, "skipped_steps") == [1, 0]
    assert np.isfinite(metrics(tmp_path, "loss")).tolist() == [True, True]


def test_50_skipped_steps_in_a_row_end_the_run_also_across_lines_of_the_log(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(haste, "MAX_SKIPPED", 3)
    poison(monkeypatch, math.inf)
    with pytest.raises(UserError, match="no finite gradient in 3 steps"):
        train(dataset, tmp_path, "--tau", 0, "--log-every", 2)
    assert checkpoints(tmp_path)[-1] == "0000004.pt"


def replace_measurement(monkeypatch):
    """The list to which each measurement of the trigger will add its step; its mean cosine is -0.05."""
    asked = []

    def measure_cosines(model, teacher, data, args, step, size):
        asked.append(step)
        return [0.3, 0.3, 0.3, -1.1]

    monkeypatch.setattr(haste, "measure_cosines", measure_cosines)
    return asked


AUTO = ("--tau", "auto", "--tau-from", 2, "--tau-every", 2)

def test_auto_fires_once_and_a_resumed_run_does_not_ask_again(dataset, tmp_path, monkeypatch, capsys):
    asked = replace_measurement(monkeypatch)
    train(dataset, tmp_path, *AUTO, "--tau-cosine", -0.04, "--max-train-steps", 3)
    assert "step 2: the mean cosine is -0.0500: tau is 2" in capsys.readouterr().out
    train(dataset, tmp_path, *AUTO, "--tau-cosine", -0.04)
    # It would have been asked again at step 4.
    assert asked == [2]
    assert checkpoint(tmp_path, 3)["tau"] == 2
    assert metrics(tmp_path, "phase") == [1, 1, 2, 2, 2, 2]
    assert len(metrics(tmp_path, "cosine")) == 1


def test_auto_that_never_fires_goes_on_asking_also_after_a_run_with_a_number(dataset, tmp_path, monkeypatch):
    asked = replace_measurement(monkeypatch)
    train(dataset, tmp_path, "--tau", 3, "--max-train-steps", 2)
    # No mean of cosines is below -1.
    train(dataset, tmp_path, *AUTO, "--tau-cosine", -1)
    # After step 2, it was not a run of auto.
    assert asked == [4, 6]
    assert checkpoint(tmp_path, 6)["tau"] is None
    assert metrics(tmp_path, "phase") == [1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("images", [1, 37])
def test_auto_measures_any_number_of_images(dataset, tmp_path, images):
    auto = ["--tau", "auto", "--tau-from", 1, "--tau-every", 2, "--tau-images", images]
    assert train(dataset, tmp_path, *auto, "--max-train-steps", 2) == 0
    assert len(metrics(tmp_path, "cosines")[0]) == 4


def test_auto_ends_a_line_of_the_log_and_saves_a_checkpoint_at_its_tau(dataset, tmp_path):
    auto = ["--tau", "auto", "--tau-from", 2, "--tau-images", 8, "--tau-cosine", 1, "--log-every", 4]
    train(dataset, tmp_path, *auto, "--checkpointing-steps", 100)
    assert checkpoints(tmp_path) == ["0000002.pt", "0000006.pt"]
    assert checkpoint(tmp_path, 2)["tau"] == 2
    assert metrics(tmp_path, "phase") == [1, 2, 2]
    assert ["loss_atta" in line for line in metrics(tmp_path)] == [False, True, False, False]
    # A run that was killed right after it goes on in phase II, and keeps the measurement.
    (tmp_path / "run/checkpoints/0000006.pt").unlink()
    train(dataset, tmp_path, *auto, "--teacher", "no such teacher")
    assert [line["step"] for line in metrics(tmp_path)] == [2, 2, 4, 6]


def test_metrics_of_a_resumed_run_have_each_step_once(dataset, tmp_path):
    auto = ["--tau", "auto", "--tau-from", 2, "--tau-every", 2, "--tau-images", 8, "--tau-cosine", -1]
    train(dataset, tmp_path / "once", *auto)
    train(dataset, tmp_path, *auto)
    # It is as if the run was killed after step 4 while it wrote a line.
    (tmp_path / "run/checkpoints/0000006.pt").unlink()
    with open(tmp_path / "run/metrics.jsonl", "a") as f:
        f.write('{"step": 7, "lo')
    train(dataset, tmp_path, *auto)
    for key in ("step", "loss", "cosine"):
        assert metrics(tmp_path, key) == metrics(tmp_path / "once", key)


def test_compiled_blocks_share_two_graphs_and_give_the_same_losses(dataset, tmp_path, monkeypatch):
    # The trigger fires after the third step. It takes other numbers of images, and is not compiled.
    auto = ["--tau", "auto", "--tau-from", 3, "--tau-images", 8, "--tau-cosine", 1]
    train(dataset, tmp_path / "eager", *auto)
    real = torch.compile
    graphs = []
    compiled = []
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        # A real compiler would take minutes.
        return graph.forward

    def compile(f, **options):
        compiled.append(type(getattr(f, "__self__", f)).__name__)
        return real(f, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(haste, "pair_loss", haste.pair_loss)        # to restore what --compile replaces
    train(dataset, tmp_path / "compiled", "--compile", *auto)
    # One graph for the blocks and one for the loss, whatever their number: each would take minutes.
    assert len(graphs) == 2
    assert compiled == ["Block"] * 4 + ["function"]
    eager_losses = metrics(tmp_path / "eager", "loss")
    assert eager_losses == pytest.approx(metrics(tmp_path / "compiled", "loss"), rel=1e-5)
    assert metrics(tmp_path / "compiled", "phase") == [1, 1, 1, 2, 2, 2]


def test_speed_of_a_line_is_the_whole_runs_without_checkpoints_and_grids(dataset, tmp_path, monkeypatch):
    clock = time.perf_counter
    saves = record_calls(monkeypatch, torch, "save")
    # As if each checkpoint took a quarter of an hour.
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1000 * len(saves))
    train(dataset, tmp_path, "--checkpointing-steps", 1, "--log-every", 3)
    rates = metrics(tmp_path, "images_per_sec")
    assert len(rates) == 2
    assert min(rates) > 0.1


# ---- 8. Training: stops, failures, flags -------------------------------------------------------------------
# Whatever ends a run, it has saved first, and the same command goes on.

@pytest.mark.parametrize("processes", [0, 2])
def test_stop_signal_saves_once_and_asks_to_be_started_again(dataset, tmp_path, processes):
    with launch(run_flags(dataset, tmp_path, "--max-train-steps", 100_000), processes) as process:
        wait_for_metrics(tmp_path, 2, process)
        # Until then, a second run in its folder is refused.
        assert "another program is writing to" in complaint(*run_flags(dataset, tmp_path))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    # torchrun ends in an error of its own; now and then it aborts, after its processes have ended.
    assert process.returncode != 0 if processes > 0 else process.returncode == 75, err
    assert "stopping: a checkpoint is saved after this step" in err
    step = metrics(tmp_path, "step")[-1]
    assert checkpoints(tmp_path)[-1] == f"{step:07d}.pt"
    assert f"stopped after step {step}; the same command resumes" in out
    # The lock that it leaves behind blocks nobody.
    haste.lock_folder(tmp_path / "run").close()


def stop_after(monkeypatch, steps):
    """Sends this process a SIGTERM while it reads the batch after so many steps of a run."""
    real = haste.Data.__getitem__
    reads = []

    def read(self, i):
        reads.append(i)
        # The start reads one item, to learn the shape, and each step 8.
        if len(reads) == 1 + 8 * steps + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, i)

    monkeypatch.setattr(haste.Data, "__getitem__", read)


def test_stops_do_not_pile_up_checkpoints(dataset, tmp_path, monkeypatch, default_signals):
    for _ in range(3):
        with monkeypatch.context() as patch:
            stop_after(patch, 1)
            assert train(dataset, tmp_path, "--checkpointing-steps", 100, "--tau", 0) == 75
    # Each of the three has made one step, and removed what the last one left.
    assert checkpoints(tmp_path) == ["0000003.pt"]
    # After a run, a signal ends the program as before.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # A stop at a step that has a checkpoint anyway leaves it.
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert train(dataset, tmp_path, "--checkpointing-steps", 4, "--tau", 0) == 75
    train(dataset, tmp_path, "--checkpointing-steps", 100, "--tau", 0)
    assert checkpoints(tmp_path) == ["0000004.pt", "0000006.pt"]


def test_a_stop_before_a_first_step_loses_no_checkpoint(
        dataset, tmp_path, monkeypatch, default_signals):
    for flags in (("--max-train-steps", 3), ("--max-train-steps", 100)):
        with monkeypatch.context() as patch:
            stop_after(patch, 0)
            assert train(dataset, tmp_path, "--checkpointing-steps", 100, *flags) == 75
        train(dataset, tmp_path, "--checkpointing-steps", 100, "--max-train-steps", 3)
        assert checkpoints(tmp_path) == ["0000003.pt"]
    train(dataset, tmp_path)
    assert "0000003.pt" in checkpoints(tmp_path)


def test_a_stop_is_heeded_when_the_terminal_is_gone(default_signals, monkeypatch):
    def write(*args):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", write)
    with haste.catch_stop_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert caught


def test_a_run_whose_loader_process_is_killed_saves_first(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(haste, "LOADER_TIMEOUT", 2)
    steps = []
    real_losses = haste.losses

    def losses(*args):
        steps.append(args)
        if len(steps) == 2:
            for process in multiprocessing.active_children():
                process.kill()
            time.sleep(0.2)
        return real_losses(*args)

    monkeypatch.setattr(haste, "losses", losses)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        haste.main(run_flags(dataset, tmp_path, "--tau", 0, "--num-workers", 1, "--checkpointing-steps", 100,
                             "--max-train-steps", 20))
    # Some batches had been read before.
    assert len(checkpoints(tmp_path)) == 1


def test_a_stop_that_also_ends_the_loader_processes_is_no_error(
        dataset, tmp_path, monkeypatch, default_signals):
    real = haste.Data.__getitem__
    reads = []

    def read(self, i):
        reads.append(i)
        # The start reads one item, and the first step 8.
        if len(reads) > 9:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker exited unexpectedly")
        return real(self, i)

    monkeypatch.setattr(haste.Data, "__getitem__", read)
    assert train(dataset, tmp_path, "--checkpointing-steps", 100) == 75
    assert checkpoints(tmp_path) == ["0000001.pt"]


def test_an_echo_of_ctrl_c_does_not_end_a_run_and_a_second_one_does(default_signals, monkeypatch):
    with haste.catch_stop_signals() as caught:
        # torchrun passes a terminal's Ctrl-C on, so that its processes get two.
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert len(caught) == 2
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 10)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_hangup_that_nohup_ignores_stays_ignored(default_signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with haste.catch_stop_signals() as caught:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
        assert not caught


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_whose_data_fail_saves_first_and_then_says_why(dataset, tmp_path, monkeypatch, workers):
    prepare(dataset / "images", tmp_path / "data")
    flags = ("--data-dir", tmp_path / "data", "--tau", 0, "--num-workers", workers)
    train(dataset, tmp_path / "whole", *flags)
    # Its image comes in the third step.
    third = list(haste.batch_indices(40, 0, 8, slice(0, 8), range(3)))[2][0]
    path = tmp_path / "data/images" / haste.PNG.format(0, third)
    content = path.read_bytes()
    path.write_bytes(b"torn")
    said = complaint(*run_flags(dataset, tmp_path, *flags, "--checkpointing-steps", 100))
    assert f"{path} cannot be read (UnidentifiedImageError" in said
    # Python ends what is left of them by SIGTERM at its exit, and waits for them.
    for process in multiprocessing.active_children():
        process.terminate()
        process.join(5)
        assert not process.is_alive()
    assert checkpoints(tmp_path) == ["0000002.pt"]
    # When the disk is back, the run goes on as if nothing had happened.
    path.write_bytes(content)
    train(dataset, tmp_path, *flags)
    assert equal_states(checkpoint(tmp_path, 6), checkpoint(tmp_path / "whole", 6))


def test_wandb_gets_a_safe_id_and_every_line(dataset, tmp_path, monkeypatch):
    wandb = types.ModuleType("wandb")
    steps = []

    def init(**options):
        wandb.run = options

    def log(line, step):
        steps.append(step)

    wandb.init = init
    wandb.log = log
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train(dataset, tmp_path, "--wandb", "project", "--exp-name", "a/b c") == 0
    assert wandb.run["id"] == "a-b-c"
    assert steps == [1, 2, 3, 4, 5, 6]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="it needs pip install wandb"):
        train(dataset, tmp_path, "--wandb", "project")


def test_a_grid_that_cannot_be_drawn_does_not_end_a_run(dataset, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise UserError("the samples are not finite")

    monkeypatch.setattr(haste, "sample", fail)
    assert train(dataset, tmp_path, "--sampling-steps", 3) == 0
    assert "0000003.png was not drawn (the samples are not finite)" in capsys.readouterr().out


def test_checkpoint_of_another_model_is_kept_and_refused(dataset, trained, tmp_path):
    # Whoever forgets to name another run must not lose this one.
    save_as(checkpoint(trained, 6), tmp_path / "run/checkpoints", "0000001.pt")
    sentence = complaint(*run_flags(dataset, tmp_path, "--model", "SiT-XS/4", "--cfg-prob", 0.5))
    assert "another --exp-name" in sentence
    assert checkpoints(tmp_path) == ["0000001.pt"]


def test_a_run_goes_on_with_a_teacher_of_another_width(dataset, trained, tmp_path, capsys):
    wide = save_teacher(tmp_path / "wide.pt", img_size=8, embed_dim=48)
    saved = torch.load(trained / "run/checkpoints/0000002.pt")
    path = save_as(saved, tmp_path / "run/checkpoints", "0000002.pt")
    assert train(dataset, tmp_path, "--cfg-prob", 0.5, "--teacher", wide) == 0
    assert f"{path} {NO_OPTIMIZER}" in capsys.readouterr().out
    assert metrics(tmp_path, "phase") == [1, 2, 2, 2]


def test_flags_that_change_on_the_way_are_mentioned(dataset, trained, tmp_path, capsys):
    shutil.copytree(trained / "run/checkpoints", tmp_path / "run/checkpoints")
    train(dataset, tmp_path, "--cfg-prob", 0.5, "--tau", "never", "--seed", 9, "--max-train-steps", 7)
    printed = capsys.readouterr().out
    assert "note: tau was 3 until now, and is never from now on" in printed
    assert "note: seed was 0 until now, and is 9 from now on" in printed
    # The optimizer goes on with this command's learning rate.
    train(dataset, tmp_path, "--learning-rate", 0.25, "--max-train-steps", 8)
    assert checkpoint(tmp_path, 8)["opt"]["param_groups"][0]["lr"] == 0.25
    assert "batch_size" not in printed


def test_defaults_are_the_papers():
    args = parse_flags("")
    expected = {
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
    assert expected.items() <= vars(args).items()
    # What the flags leave open depends on the dataset.
    latents_of_512_px = types.SimpleNamespace(shape=(4, 64, 64))
    haste.fill_defaults(args, latents_of_512_px)
    assert args.model == "SiT-XL/2"
    assert args.tau == 300_000
    assert args.attention_blocks == (4, 5, 6, 7)
    assert args.teacher_blocks == (8, 9, 10, 11)
    assert args.encoder_depth == 8
    assert haste.loss_weights(args) == {"diff": 1, "repa": 0.5, "atta": 0.5}


@pytest.mark.parametrize("name, tau", [
    ("SiT-B/2", 100_000),
    ("SiT-L/2", 250_000),
    ("SiT-XL/2", 250_000),
    ("DiT-XL/2", 250_000),
    ("MMDiT", 200_000),
])
def test_tau_is_the_papers_for_each_model(name, tau):
    _, config, _ = haste.parse_name(name)
    assert config.tau == tau


def test_repas_and_hastes_names_of_flags_are_understood():
    args = parse_flags("--early-stop-point 7 --proj-coeff 1 --attn-coeff 2 --enc-type x")
    assert args.tau == 7
    assert args.lambda_r == 1
    assert args.lambda_a == 2
    assert args.teacher == "x"


BAD_FLAGS = {
    "--batch-size 7 --gradient-accumulation-steps 2": "must divide into 2 equal parts",
    "--tau auto --tau-from 6": "measures first at step 6, and the run ends at 6",
    "--model SiT-XL/3": "unknown model SiT-XL/3",
}

@pytest.mark.parametrize("flags, words", BAD_FLAGS.items())
def test_what_would_silently_train_something_else_is_refused(dataset, tmp_path, flags, words):
    assert words in complaint(*run_flags(dataset, tmp_path, *flags.split()))
    # Nothing is left of a run that did not start.
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["--tau -1", "--tau 1e5", "--batch-size 1.5", "--precision bfloat16", "--ckpt x"])
def test_a_wrong_flag_ends_in_argparses_own_words(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        haste.main(flags.split())
    assert stop.value.code == 2
    assert "haste.py: error: " in capsys.readouterr().err


def test_each_flag_has_its_own_default_in_the_help_and_none_says_none(capsys):
    for parse in (haste.parse_args, evaluate.parse_args):
        with pytest.raises(SystemExit):
            parse(["--help"])
    printed = capsys.readouterr().out
    assert "(default: None)" not in printed
    assert "(default: False)" not in printed
    assert "(default: 50000)" in printed
    assert "seed of all randomness (default: 0)" in printed


def test_main_works_in_a_notebook_and_leaves_the_process_as_it_was(dataset, tmp_path):
    handlers = [signal.getsignal(number) for number in haste.STOP_SIGNALS]
    assert haste.main(run_flags(dataset, tmp_path, "--max-train-steps", 1)) == 0
    assert [signal.getsignal(number) for number in haste.STOP_SIGNALS] == handlers


def test_the_program_and_evaluate_meet_in_one_module(tmp_path, monkeypatch):
    # A second module would have another UserError, and this would be a traceback.
    copy = tmp_path / "mine.py"
    text = Path(HASTE).read_text().replace("is not a prepared dataset", "is not what I want")
    copy.write_text(text.replace("return evaluate.demo(", "return evaluate.haste.Data('nowhere') if True else ("))
    monkeypatch.setitem(sys.modules, "haste", haste)
    monkeypatch.delitem(sys.modules, "evaluate")
    monkeypatch.setattr(sys, "argv", ["mine.py", "--demo"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(copy), run_name="__main__")
    # A copy under another name runs its own code, also where evaluate.py calls it.
    assert stop.value.code.startswith("error: ") and "nowhere is not what I want" in stop.value.code


# ---- 9. Sampling -------------------------------------------------------------------------------------------
# Grids are of the EMA, and show the classes that were asked for.

def test_sample_draws_the_labels_asked_for_and_names_their_classes(trained, tmp_path, capsys):
    # A run's folder stands for its newest checkpoint.
    for path in (trained / "run/checkpoints/0000006.pt", trained / "run"):
        flags = f"--sample {path} --num-steps 2 --out {tmp_path}/grid.png --labels"
        haste.sample_from(parse_flags(flags, 3, 0))
        with Image.open(tmp_path / "grid.png") as grid:
            # These are two images of 8 x 8, enlarged to be seen, with a frame of 1.
            assert grid.size == (2 * 129 + 1, 130)
        assert "3 class3, 0 class0" in capsys.readouterr().out
    # 4 is the null label, of no class.
    assert "classes are 0 to 3" in complaint(*flags.split(), 4)


def test_model_without_label_dropout_cannot_be_guided(dataset, tmp_path, capsys):
    # Its own grids are drawn without guidance.
    train(dataset, tmp_path, "--cfg-prob", 0, "--sampling-steps", 1, "--max-train-steps", 1)
    assert "not drawn" not in capsys.readouterr().out
    flags = f"--sample {tmp_path}/run --num-steps 2 --out {tmp_path}/grid.png"
    assert "use --cfg-scale 1" in complaint(*flags.split())
    haste.sample_from(parse_flags(flags, "--cfg-scale", 1))


# ---- 10. DiT and MM-DiT ------------------------------------------------------------------------------------
# DiT's loss and samplers are those of DiT's code; MM-DiT's figures are the released code's.

def test_dits_code_gives_the_same_figures(monkeypatch):
    """Loss, gradients and 12 respaced, guided steps."""
    sizes = dict(input_size=16, in_channels=4, hidden_size=96, num_classes=10)
    model = with_fixed_weights(tiny_model(haste.DiT, **sizes), without="projectors")
    x0 = 0.5 * fixed_normal(1, 3, 4, 16, 16)
    eps = fixed_normal(2, 3, 4, 16, 16)
    t = torch.tensor([0, 0.0375, 0.8])
    y = torch.tensor([3, 7, 1])

    def loss(rows):
        terms = haste.losses(model, model.diffusion, x0[rows], eps[rows], t[rows], y[rows], None, WEIGHTS)
        return terms["diff"]

    # At t = 0 the bound is another one, and so the three are looked at one by one.
    each = [loss([i]).item() for i in range(3)]
    assert each == close_to([4.971220, 2.421021, 2.295545], 1e-5)
    loss(slice(3)).backward()
    assert_gradient_norms(model, {
        "x_embedder.proj.weight": 0.33424,
        "blocks.1.attn.qkv.weight": 0.605419,
        "final_layer.linear.weight": 2.372707,
    })
    fix_noise(monkeypatch)
    noise = fixed_normal(9, 3, 4, 16, 16)
    samples = haste.sample(model, noise, y, steps=12, cfg_scale=1.8, mode="ddpm")
    assert samples[1, :, 11, 3].tolist() == close_to([-120.932564, -170.767593, -589.873779, -355.143188])
    assert samples.abs().mean().item() == close_to(226.444138)


def test_time_becomes_one_of_dits_1000_timesteps():
    def timesteps(t):
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        _, timestep = haste.DDPM().add_noise(x, x, t)
        return timestep.tolist()

    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    counts = np.bincount(np.int64(timesteps(uniform)))
    assert counts.tolist() == pytest.approx([100] * 1000, abs=50)
    assert timesteps(torch.tensor([0, 1 - 2 ** -24, 1.0])) == [0, 999, 999]
    assert timesteps(torch.tensor(haste.TRIGGER_TIMES)) == [20, 100, 500, 800]


@pytest.mark.parametrize("steps", [250, 21, 1000])
def test_respaced_schedule_against_bayes(steps):
    # DiT's code rounds sums, not products, in fp64. Of 21 timesteps, this decides one in the middle.
    kept = []
    at = 0.0
    for _ in range(steps):
        kept.append(round(at))
        at += 999 / (steps - 1)
    abars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[kept]
    timesteps, table = haste.ddpm_schedule(steps, torch.device("cpu"), torch.float64)
    assert timesteps == kept
    for i in (1, 2, steps // 2, steps - 1):
        before = abars[i - 1]
        abar = abars[i]
        # x_t = sqrt(keep) x_s + sqrt(1 - keep) noise, and x_s = sqrt(before) x0 + sqrt(1 - before) noise.
        # The precisions of what each of them says about x_s add up.
        keep = abar / before
        precision = keep / (1 - keep) + 1 / (1 - before)
        by_hand = [
            abar ** 0.5,
            (1 - abar) ** 0.5,
            before ** 0.5 / (1 - before) / precision,
            keep ** 0.5 / (1 - keep) / precision,
            math.log(1 - keep),
            -math.log(precision),
        ]
        assert table[:, i].tolist() == pytest.approx(by_hand, rel=1e-9)


class GaussianNoise(GaussianVelocity):
    """The exact noise in data from N(0, 1/4), E[eps | x_t], of label 0; half of it for the null label."""

    diffusion = haste.DDPM()
    guided_channels = 3

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item(), y.tolist()))
        signal, noise, *_ = haste.ddpm_at(t.long(), x.double())
        share = torch.where(y == 3, 0.5, 1.0).view(-1, 1, 1, 1)
        eps = noise / (signal ** 2 / 4 + noise ** 2) * x * share
        smallest_variance = -torch.ones_like(eps)
        return torch.cat([eps, smallest_variance], dim=1).to(x.dtype)


@pytest.mark.parametrize("mode", ["ddpm", "sde"])
def test_dits_samplers_turn_noise_into_data_and_guide_three_channels(mode):
    noise, y = noise_and_labels(4, 16)

    def draw(*how):
        model = GaussianNoise()
        torch.manual_seed(0)
        return haste.sample(model, noise, y, *how, mode=mode), model.calls

    x, calls = draw(250)
    assert x.std().item() == pytest.approx(0.5, abs=0.03)
    timesteps, _ = haste.ddpm_schedule(250, noise.device, torch.float64)
    assert [t for _, t, _ in calls] == timesteps[::-1]
    guided, _ = draw(250, 3.0)
    assert torch.equal(x[:, 3], guided[:, 3])
    assert (x[:, :3] != guided[:, :3]).all()
    _, calls = draw(10, 3.0, (0.3, 0.7))
    for n, t, _ in calls:
        assert n == (8 if 300 <= t <= 700 else 4)


def test_dit_has_sits_network_and_loads_its_authors_names():
    _, count = count_parameters("DiT-XL/2")
    assert count == 675_129_632
    assert tiny_model(haste.DiT).state_dict().keys() == tiny_model().state_dict().keys()


def test_released_mmdit_gives_the_same_figures():
    sizes = dict(hidden_size=288, depth=9, num_heads=9, teacher_dim=48, projector_dim=96)
    model = with_fixed_weights(haste.MMDiT(**sizes))
    x = fixed_normal(1, 2, 4, 32, 32)
    text = fixed_normal(2, 2, 7, 768)
    v, z, qk = model(x, torch.tensor([0.3, 0.8]), text, align=True)
    assert v[0, :, 5, 9].tolist() == close_to([-1.149736, -0.551603, 1.262833, -1.376827])
    assert z[0, 17, :3].tolist() == close_to([0.203212, -0.38475, -0.734253])
    q, k = qk[2]
    logits = q @ k.mT / 32 ** 0.5
    assert logits[1, 3, 10, :3].tolist() == close_to([0.281714, 1.998466, -0.598364])
    v.square().mean().backward()
    assert_gradient_norms(model, {
        "context_embedder.weight": 0.066919,
        "joint_blocks.8.context_block.attn.qkv.weight": 0.020626,
        "joint_blocks.5.x_block.attn.qkv.weight": 0.395535,
    })


def test_mmdits_parameters_are_those_of_the_released_code():
    parameters, count = count_parameters("MMDiT")
    assert count - parameters["pos_embed"].numel() == 505_070_608
    # In the last block, nothing reads the text after the attention.
    prefix = "joint_blocks.23.context_block."
    names = [name.removeprefix(prefix) for name in parameters if name.startswith(prefix)]
    expected = ["attn.qkv.weight", "attn.qkv.bias", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias"]
    assert sorted(names) == sorted(expected)


def test_text_is_never_supervised_and_no_parameter_is_unused():
    torch.manual_seed(0)
    sizes = TINY | {"depth": 10, "attention_blocks": (4, 5, 6, 7), "feature_block": 8}
    model = haste.MMDiT(**sizes)
    teacher = haste.Teacher(tiny_vit(), (8, 9, 10, 11), 4)
    target = teacher(to_batch(random_images(2)))
    x0, eps = torch.randn(2, 2, 3, 8, 8)
    y = torch.randn(2, 5, 768)
    terms = haste.losses(model, model.diffusion, x0, eps, torch.rand(2), y, target, WEIGHTS)
    terms["atta"].backward(retain_graph=True)
    for name, p in model.named_parameters():
        if ".context_block." not in name:
            continue
        block = int(name.split(".")[1])
        # Text reaches the image's maps by way of the image's tokens, up to block 6, as the last map is block
        # 7's. Of the text's weights in block 6, only a part comes before it.
        if block > 6:
            assert p.grad is None
        if block < 6:
            assert p.grad.any()
    # DDP waits for every parameter that is not frozen.
    model.zero_grad()
    terms["diff"].backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    for name in unused:
        assert name.startswith(("projectors", "pos_embed"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of one block, which knows four letters, in place of the real one, and a small MMDiT."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "0</w>": 3, "1</w>": 4, "e</w>": 5}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt").save_pretrained(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=6, hidden_size=768, intermediate_size=8, num_hidden_layers=1, num_attention_heads=12,
        bos_token_id=0, eos_token_id=1)
    transformers.CLIPTextModel(config).save_pretrained(folder)
    small = haste.Config(
        depth=3, hidden_size=32, num_heads=4, attention_blocks=(1,), feature_block=2, projector_dim=16,
        teacher_blocks=(10,), tau=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(haste, "CLIP", str(folder))
        patch.setitem(haste.CONFIGS, "MMDiT", small)
        haste.load_clip.cache_clear()
        yield
    haste.load_clip.cache_clear()


@pytest.fixture
def coco(tmp_path):
    """The path of COCO's JSON for the dataset's images, with two captions of each but the first."""
    images = [{"id": 0, "file_name": "class0/00.png"}]
    captions = []
    for i in range(1, 40):
        images.append({"id": 7 * i, "file_name": f"class{i % 4}/{i:02d}.png"})
        captions.append({"image_id": 7 * i, "caption": f" image {i} 0 "})
        captions.append({"image_id": 7 * i, "caption": f" image {i} 1 "})
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return tmp_path / "coco.json"


def test_captions_are_dropped_and_chosen_by_one_number(dataset, coco, tmp_path):
    data = prepare(dataset / "images", tmp_path / "data", "--captions", coco)
    # The first image has no captions.
    assert len(data) == 39
    first = data.captions[data.names[0]]
    last = data.captions[data.names[38]]
    assert first == ["image 4 0", "image 4 1"]
    # Below cfg_prob there is no caption; above it, each has half of the interval.
    u = torch.tensor([0.05, 0.1, 0.54, 0.56, 0.999])
    chosen = haste.choose_captions(data, torch.tensor([0, 0, 0, 0, 38]), u, 0.1)
    assert chosen == ["", first[0], first[0], first[1], last[1]]


def test_captions_are_encoded_alike_inside_and_outside_of_autocast(clip):
    outside = haste.encode_captions(["a e"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(haste.encode_captions(["a e"]), outside)


def test_mmdit_trains_through_tau_resumes_and_draws_captions(dataset, clip, coco, tmp_path, capsys):
    prepare(dataset / "images", tmp_path / "data", "--captions", coco)
    flags = ("--data-dir", tmp_path / "data", "--model", "MMDiT")
    train(dataset, tmp_path / "whole", *flags, "--sampling-steps", 6)
    train(dataset, tmp_path / "stopped", *flags, "--max-train-steps", 2)
    train(dataset, tmp_path / "stopped", *flags)
    # The order of captions, too, is a function of seed and step.
    assert weight_difference(tmp_path / "whole", tmp_path / "stopped") == 0
    sample = f"--sample {tmp_path}/whole/run --num-steps 2 --out {tmp_path}/grid.png --captions"
    haste.sample_from(parse_flags(sample, "a red bus", "a cat"))
    assert "a red bus, a cat" in capsys.readouterr().out


# ---- evaluate.py: the network and the metrics --------------------------------------------------------------
# Features are the FID Inception's, and the five metrics ADM's formulas.

class TinyInception(nn.Module):
    """Stands in for the Inception: 24, 20 and 12 features of an image."""

    def __init__(self, weights=None):
        super().__init__()
        self.register_buffer("w", fixed_normal(0, 12, 56))

    def forward(self, images):
        # Its features depend on all pixels, and stay within [-1, 1].
        x = F.adaptive_avg_pool2d(images.float() / 64, 2).flatten(1)        # (B, 12)
        return (x @ self.w).sin().split([24, 20, 12], dim=1)


TINY_INCEPTION = {"Inception": TinyInception, "POOL_DIM": 24, "SPATIAL_DIM": 20, "LOGITS_DIM": 12}


@pytest.fixture
def tiny_inception(monkeypatch):
    """TinyInception in place of the Inception, and its sizes in place of the Inception's."""
    for name, value in TINY_INCEPTION.items():
        monkeypatch.setattr(evaluate, name, value)


def parse_evaluate_flags(*argv):
    """The values of evaluate.py's flags."""
    return evaluate.parse_args(["--num-workers", "0", *to_argv(argv)])


def evaluate_flags(*argv):
    """The metrics that evaluate.py measures of one checkpoint, or of one set of samples, with these flags."""
    [report] = evaluate.evaluate(parse_evaluate_flags(*argv)).values()
    return metrics_of(report)


def metrics_of(report):
    """Those entries of a report that are metrics."""
    return {name: report[name] for name in evaluate.METRICS if name in report}


def make_reference(images, path):
    """A reference that --make-ref writes; returns its path."""
    evaluate.evaluate(parse_evaluate_flags("--make-ref", images, "--out", path))
    return path


def make_sampler(*argv):
    """The Sampler of the one checkpoint that these flags name."""
    args = parse_evaluate_flags(*argv)
    return evaluate.Sampler(args, args.ckpt[0])


def save_npz(path, arr_0, **more):
    """Saves images as ADM does, and returns the path."""
    np.savez(path, arr_0=arr_0, **more)
    return path


@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (32, 32), (299, 299), (300, 64), (512, 299)])
def test_resize_is_tensorflow_1s_to_the_bit(height, width):
    x = random_images(1, 0, (height, width))[0, :, :, 0].astype(np.float32)
    resized = evaluate.tf1_resize(torch.from_numpy(x)[None, None])

    def neighbours(n):
        # TensorFlow 1 takes 0, n / 299, 2 n / 299, ... in fp32: without half-pixel centres.
        positions = np.arange(299, dtype=np.float32) * np.float32(n / 299)
        low = np.floor(positions)
        high = np.minimum(low + 1, n - 1)
        return low.astype(int), high.astype(int), positions - low

    top, bottom, dy = neighbours(height)
    left, right, dx = neighbours(width)
    x = x[:, left] + (x[:, right] - x[:, left]) * dx
    x = x[top] + (x[bottom] - x[top]) * dy[:, None]
    assert np.array_equal(resized[0, 0], x)


def naive_distance(x, y):
    """The Frechet distance of features x (n, d) and y (m, d).

    tr (S_1 S_2)^(1/2) is the sum of the singular values of X Y^T / sqrt((n - 1) (m - 1)), X and Y centred.
    """
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    x = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    y = (y - y.mean(0)) / math.sqrt(len(y) - 1)
    singular_values = np.linalg.svd(x @ y.T, compute_uv=False)
    return means + (x ** 2).sum() + (y ** 2).sum() - 2 * singular_values.sum()


def naive_inception_score(logits):
    """The Inception Score, split by split, with softmax as it is written."""
    scores = []
    for start in range(0, len(logits), evaluate.SPLIT_SIZE):
        part = np.exp(logits[start:start + evaluate.SPLIT_SIZE])
        p = part / part.sum(1, keepdims=True)
        divergences = (p * (np.log(p) - np.log(p.mean(0)))).sum(1)
        scores.append(np.exp(divergences.mean()))
    return np.mean(scores)


def naive_precision(x, y):
    """The fraction of x that is no farther from one of y than that one's third neighbour in y is."""
    radii = []
    for a in y:
        distances = sorted(((a - b) ** 2).sum() for b in y)
        # The first is its distance from itself.
        radii.append(distances[3])
    hits = []
    for a in x:
        hits.append(any(((a - b) ** 2).sum() <= radius for b, radius in zip(y, radii)))
    return np.mean(hits)


def naive_metrics(network, x, y):
    """All metrics of the images x against y, by loops over a network's features in fp64."""
    pool_x, spatial_x, logits = [part.double().numpy() for part in network(to_batch(x))]
    pool_y, spatial_y, _ = [part.double().numpy() for part in network(to_batch(y))]
    return {
        "fid": naive_distance(pool_x, pool_y),
        "sfid": naive_distance(spatial_x, spatial_y),
        "is": naive_inception_score(logits),
        "precision": naive_precision(pool_x, pool_y),
        "recall": naive_precision(pool_y, pool_x),
    }


def evaluate_images(folder, x, y, *more):
    """The metrics of the images x against the reference y, both of an .npz in this folder."""
    samples = save_npz(folder / "x.npz", x)
    reference = save_npz(folder / "y.npz", y)
    return evaluate_flags("--samples", samples, "--ref", reference, *more)


@torch.no_grad()
def test_features_of_random_weights_are_torch_fidelitys_figures():
    # torch-fidelity's network had the weights of "random", and saw these images. Two features of each of the
    # two images, then mean and standard deviation of all.
    expected = [
        [0.91442, 33.95115, 0.19516, 67.85587, 27.94207, 43.83376],     # pool
        [0.60445, 4.85741, 0.0, 4.05868, 4.75907, 6.79113],             # spatial
        [18.82058, 54.41476, 66.80949, 120.79, 4.04445, 72.41494],      # logits
    ]
    images = to_batch(random_images(2, 1, (2, 2)).repeat(20, 1).repeat(20, 2))
    for features, figures in zip(evaluate.Inception("random")(images), expected, strict=True):
        found = [*features[0, :2], *features[1, :2], features.mean(), features.std()]
        assert torch.stack(found).tolist() == pytest.approx(figures, rel=1e-4, abs=1e-4)


def test_metrics_are_those_of_torch_fidelitys_features(tmp_path, monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path / "weights.pth"
    randomise = evaluate.randomise

    def randomise_and_save(net):
        randomise(net)
        # With weights this small, no class has all of the probability.
        net.fc.weight.data /= 20
        torch.save(net.state_dict(), path)

    monkeypatch.setattr(evaluate, "randomise", randomise_and_save)
    evaluate.Inception("random")
    theirs = module.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    theirs.eval()
    # sFID's features are the first seven channels in here, which torch-fidelity does not return.
    branch = record_outputs(theirs.Mixed_6d.branch1x1)

    def network(images):
        pool, logits = theirs(images)
        spatial = branch[-1][:, :7].permute(0, 2, 3, 1).flatten(1)
        return pool, spatial, logits

    # Noise alone gives all images nearly the same features.
    smooth = random_images(16, 1, (2, 2)).repeat(20, 1).repeat(20, 2)
    x = smooth[:8]
    y = smooth[8:] // 2 + random_images(8, 2, (40, 40)) // 2
    measured = evaluate_images(tmp_path, x, y, "--inception", path)
    assert measured == pytest.approx(naive_metrics(network, x, y), rel=2e-6)
    assert measured["is"] > 1.1


def test_frechet_distance_is_the_textbooks_with_scipys_matrix_square_root():
    x = fixed_normal(0, 200, 30).double()
    y = fixed_normal(1, 150, 30).double() @ fixed_normal(2, 30, 30).double() + 1
    mu1, sigma1, mu2, sigma2 = x.mean(0), x.T.cov(), y.mean(0), y.T.cov()
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy()).real
    expected = ((mu1 - mu2) ** 2).sum() + sigma1.trace() + sigma2.trace() - 2 * np.trace(root)
    assert evaluate.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("n, m", [(200, 150), (12, 9), (9, 200)])
def test_frechet_distance_is_exact_also_without_full_rank(n, m):
    x = fixed_normal(0, n, 30).double()
    y = fixed_normal(1, m, 30).double() @ fixed_normal(2, 30, 30).double() + 1
    # With fewer samples than features, a square root of the product of covariances is not exact.
    measured = evaluate.frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert measured == pytest.approx(naive_distance(x.numpy(), y.numpy()), rel=1e-9)


@pytest.mark.parametrize("n", [60, 50, 20])
def test_metrics_are_those_of_the_formulas_in_full_fp32(tiny_inception, tmp_path, monkeypatch, n):
    # In splits of 25, the last one has 10, 25 or 20 samples.
    monkeypatch.setattr(evaluate, "SPLIT_SIZE", 25)
    x = random_images(n)
    y = random_images(50, 1) // 2 + 60
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 7)
    measured = evaluate_images(tmp_path, x, y)
    assert measured == pytest.approx(naive_metrics(TinyInception(), x, y), rel=1e-6)
    # Drawing allows TF32, which would move FID by 0.04.
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


# ---- evaluate.py: images -----------------------------------------------------------------------------------
# An .npz and a folder of the same images give the same figures.

def test_npz_folder_and_prepared_dataset_give_the_same_figures(tiny_inception, tmp_path, monkeypatch):
    images = random_images(30)
    ref = save_npz(tmp_path / "ref.npz", random_images(40, 1))
    save_npz(tmp_path / "stored.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", labels=np.arange(30), arr_0=images)
    write_pngs(tmp_path / "tree/class", images)
    prepare(tmp_path / "tree", tmp_path / "data")
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 8)
    found = []
    for name in ("stored.npz", "packed.npz", "tree", "data"):
        for workers in (0, 2):
            found.append(evaluate_flags("--samples", tmp_path / name, "--ref", ref, "--num-workers", workers))
    assert found == found[:1] * 8


def test_folder_follows_links_and_leaves_out_what_is_hidden_or_no_image(tmp_path):
    folder = tmp_path / "samples"
    write_pngs(folder / "0", random_images(4))
    elsewhere = write_pngs(tmp_path / "elsewhere", random_images(4, 1))
    (folder / "1").symlink_to(elsewhere)
    write_pngs(folder / ".cache", random_images(2, 2))
    (folder / "notes.txt").write_text("no image")
    images = evaluate.Folder(folder)
    assert images.shape == (8, 8, 8, 3)
    assert torch.equal(images[range(4, 8)], to_batch(random_images(4, 1)))


@pytest.fixture
def made_ref(tiny_inception, tmp_path):
    """(folder of 30 images, the reference that --make-ref writes of them)."""
    images = write_pngs(tmp_path / "real", random_images(30))
    return images, make_reference(images, tmp_path / "sub/ref.npz")


def test_a_reference_that_make_ref_wrote_gives_the_same_figures(made_ref, tmp_path):
    images, ref = made_ref
    samples = save_npz(tmp_path / "samples.npz", random_images(35, 1))
    of_images = evaluate_flags("--samples", samples, "--ref", images)
    assert evaluate_flags("--samples", samples, "--ref", ref) == pytest.approx(of_images, rel=1e-9)
    assert np.array_equal(np.load(ref)["arr_0"], random_images(30))


def test_make_ref_stores_a_few_of_many_images_from_all_over(made_ref, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    images, ref = made_ref
    monkeypatch.setattr(evaluate, "MAX_REFERENCES", 4)
    with pytest.raises(UserError, match="ref.npz exists already: name another file"):
        make_reference(images, ref)
    ref = make_reference(images, "few.npz")
    assert np.array_equal(np.load(ref)["arr_0"], random_images(30)[[0, 10, 19, 29]])


def test_a_reference_of_statistics_alone_gives_fid_and_sfid(made_ref, tmp_path):
    images, ref = made_ref
    samples = save_npz(tmp_path / "samples.npz", random_images(35, 1))
    expected = evaluate_flags("--samples", samples, "--ref", images)
    del expected["precision"], expected["recall"]
    statistics = dict(np.load(ref))
    del statistics["arr_0"]
    np.savez(tmp_path / "statistics.npz", **statistics)
    measured = evaluate_flags("--samples", samples, "--ref", tmp_path / "statistics.npz")
    assert measured == pytest.approx(expected, rel=1e-9)


def test_a_reference_of_mu_and_sigma_alone_gives_fid_and_a_note(made_ref, tmp_path, capsys):
    images, ref = made_ref
    samples = save_npz(tmp_path / "samples.npz", random_images(35, 1))
    of_images = evaluate_flags("--samples", samples, "--ref", images)
    statistics = np.load(ref)
    np.savez(tmp_path / "fid.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    capsys.readouterr()
    measured = evaluate_flags("--samples", samples, "--ref", tmp_path / "fid.npz")
    assert list(measured) == ["fid", "is"]
    assert measured["fid"] == pytest.approx(of_images["fid"], rel=1e-9)
    # These programs write such files, of features of another resize.
    assert "pytorch-fid and clean-fid" in capsys.readouterr().out


def test_statistics_that_samples_bring_are_used_as_adm_uses_them(made_ref, tmp_path):
    _, ref = made_ref
    statistics = dict(np.load(ref))
    del statistics["arr_0"]
    samples = save_npz(tmp_path / "own.npz", random_images(40, 6), **statistics)
    assert abs(evaluate_flags("--samples", samples, "--ref", ref)["fid"]) < 1e-6


def test_what_makes_a_fid_incomparable_is_printed_and_stored(tiny_inception, tmp_path, capsys):
    ref = save_npz(tmp_path / "ref.npz", random_images(20))
    (tmp_path / "samples/class").mkdir(parents=True)
    for i, array in enumerate(random_images(12, 1, (8, 12))):
        Image.fromarray(array).save(tmp_path / f"samples/class/{i}.JPG", "JPEG")
    path = tmp_path / "out.json"
    samples = str(tmp_path / "samples")
    evaluate_flags("--samples", samples, "--inception", "random", "--json", path, "--ref", ref)
    printed = capsys.readouterr().out
    notes = json.loads(path.read_text())[samples]["notes"]
    expected = ["random", "differ in size", "JPEG", "only 12 samples instead of 50,000"]
    for words, note in zip(expected, notes, strict=True):
        assert words in note
        assert f"note: {note}\n" in printed
    # Of an .npz, only their number is wrong.
    evaluate_flags("--samples", ref, "--ref", ref)
    assert capsys.readouterr().out.count("note: ") == 1


# ---- evaluate.py: samples of a checkpoint ------------------------------------------------------------------
# Samples follow the protocol, resume, and are never mixed with others.

def save_checkpoint(path, seed=0, **args):
    """Saves a SiT-XS/4 for 8 x 8 pixels and 4 classes, whose "model" and "ema" differ; returns its path."""
    torch.manual_seed(seed)
    sizes = dict(input_size=8, in_channels=3, num_classes=4)
    model = haste.build_model("SiT-XS/4", **sizes)
    ema = with_random_weights(haste.build_model("SiT-XS/4", **sizes))
    state = {"model": model.state_dict(), "ema": ema.state_dict(), "steps": 2}
    state["args"] = {"model": "SiT-XS/4", "vae": None, "scale": 1.0, "cfg_prob": 0.1} | args
    return save_as(state, path.parent, path.name)


@pytest.fixture
def sample_flags(tmp_path):
    """Flags that draw 20 samples of a checkpoint in 5 batches."""
    return make_sample_flags(tmp_path)


def make_sample_flags(folder):
    ref = save_npz(folder / "ref.npz", random_images(30))
    path = save_checkpoint(folder / "run/checkpoints/0000002.pt")
    return to_argv(["--ckpt", path, "--ref", ref, "--num-samples", 20, "--batch-size", 4, "--num-steps", 3])


@pytest.fixture
def sampled_batches(monkeypatch):
    """The list to which each batch of samples that is drawn will be added, as (sampler, rows)."""
    return record_calls(monkeypatch, evaluate.Sampler, "sample")


def read_folder(folder):
    """The bytes of each file, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_protocol_is_printed_and_stored(tiny_inception, sample_flags, tmp_path, capsys):
    more = "--mode heun --cfg-scale 1.5 --guidance-high 0.7 --inception random --balanced --seed 3".split()
    results = evaluate_flags(*sample_flags, *more, "--json", tmp_path / "out.json")
    assert list(results) == ["fid", "sfid", "is", "precision", "recall"]
    # The default folder is the run's, and its name tells apart what is drawn in different ways.
    folder = tmp_path / "run/eval/0000002-heun-3-cfg-1.5-in-0-0.7-seed-3-20-balanced-fp32"
    path = sample_flags[1]
    report = json.loads((tmp_path / "out.json").read_text())[path]
    assert report == json.loads(Path(f"{folder}-{tmp_path.name}-ref.json").read_text())
    settings = {"mode": "heun", "num_steps": 3, "cfg_scale": 1.5, "guidance_high": 0.7, "seed": 3,
                "batch_size": 4, "num_samples": 20, "balanced": True, "precision": "fp32"}
    assert metrics_of(report) == results
    assert (report["num_samples"], report["inception"]) == (20, "random")
    assert (settings | {"model": "SiT-XS/4"}).items() <= report["settings"].items()
    printed = capsys.readouterr().out
    for name, value in settings.items():
        assert f"{name} {value}" in printed
    # Six digits are printed, and all are stored.
    assert f"| {path} | 20 | {results['fid']:.6g} | {results['sfid']:.6g} |" in printed


def test_several_checkpoints_are_rows_of_one_table_and_the_reference_is_measured_once(
        tiny_inception, sample_flags, tmp_path, monkeypatch, capsys):
    first = Path(sample_flags[1])
    second = save_checkpoint(tmp_path / "run/checkpoints/0000010.pt", seed=1)
    third = save_checkpoint(tmp_path / "other/checkpoints/0000004.pt", seed=2)
    save_checkpoint(tmp_path / "other/checkpoints/0000003.pt")
    (first.parent / "notes.pt").write_text("not a checkpoint of a run")
    measured = record_calls(monkeypatch, evaluate, "measure")
    # A folder of checkpoints, and a run.
    flags = ["--ckpt", first.parent, tmp_path / "other", *sample_flags[2:]]
    reports = evaluate.evaluate(parse_evaluate_flags(*flags, "--json", tmp_path / "out.json"))
    assert list(reports) == [str(first), str(second), str(third)]
    assert [title for *_, title in measured] == ["reference", "samples", "samples", "samples"]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 4
    for path, row in zip(reports, rows[1:]):
        alone = evaluate_flags("--ckpt", path, *sample_flags[2:])
        assert metrics_of(reports[path]) == alone
        assert [float(cell) for cell in row.split(" | ")[2:5]] == close_to(list(alone.values())[:3], 1e-5)
    assert list(json.loads((tmp_path / "out.json").read_text())) == list(reports)
    with pytest.raises(UserError, match="cannot share one --out"):
        evaluate.evaluate(parse_evaluate_flags(*flags, "--out", tmp_path / "mine"))


def test_samples_are_the_emas_and_a_function_of_seed_and_batch(tiny_inception, sample_flags):
    evaluate_flags(*sample_flags)
    sampler = make_sampler(*sample_flags)
    assert equal_states(sampler.model.state_dict(), torch.load(sample_flags[1])["ema"])
    third_batch = evaluate.Folder(sampler.folder)[range(8, 12)]
    assert torch.equal(third_batch, sampler.sample(range(8, 12)))
    sampler.args.seed = 1
    assert not torch.equal(third_batch, sampler.sample(range(8, 12)))


def test_the_sde_does_not_draw_its_starting_noise_again(sample_flags, monkeypatch):
    sampler = make_sampler(*sample_flags)
    seen = []

    def sample(model, noise, *how):
        seen.append(noise)
        # The SDE draws its noise in this way.
        seen.append(torch.randn_like(noise))
        return noise

    monkeypatch.setattr(haste, "sample", sample)
    sampler.sample(range(4))
    sampler.sample(range(4, 8))
    # Four rows: the two starts, and the noise that comes after each.
    correlations = torch.corrcoef(torch.stack(seen).flatten(1))
    assert (correlations.abs() - torch.eye(4)).max() < 0.2


def test_only_missing_samples_are_drawn_and_the_figures_stay(
        tiny_inception, sample_flags, sampled_batches, tmp_path):
    folder = tmp_path / "mine"
    flags = [*sample_flags, "--out", folder]
    whole = evaluate_flags(*flags)
    before = read_folder(folder)
    assert len(sampled_batches) == 5
    for name in ("000005.png", "000006.png", "000019.png"):
        (folder / name).unlink()
    (folder / "000007.png.part").write_bytes(b"what a killed process left")
    # The second time there is nothing to draw.
    for _ in range(2):
        assert evaluate_flags(*flags) == whole
        assert [rows.start for _, rows in sampled_batches[5:]] == [4, 16]
    assert read_folder(folder) == before
    as_samples = evaluate_flags("--samples", folder, "--ref", tmp_path / "ref.npz")
    assert as_samples == whole


def test_samples_drawn_in_another_way_are_not_mixed(tiny_inception, sample_flags, sampled_batches, tmp_path):
    folder = tmp_path / "mine"
    flags = [*sample_flags, "--out", folder]
    evaluate_flags(*flags)
    before = read_folder(folder)
    # A flag that is missing here would let two kinds of samples be measured as one.
    others = ("--seed=1", "--num-steps=4", "--cfg-scale=2", "--cfg-scale=2 --guidance-high=.5", "--mode=ode",
              "--balanced", "--precision=bf16", "--batch-size=5", "--num-samples=19")
    for other in others:
        with pytest.raises(UserError, match="drawn in another way"):
            evaluate_flags(*flags, *other.split())
    save_checkpoint(tmp_path / "run/checkpoints/0000002.pt", seed=1)
    with pytest.raises(UserError, match="drawn in another way, .* .weights.: name another --out"):
        evaluate_flags(*flags)
    assert read_folder(folder) == before
    assert len(sampled_batches) == 5


@pytest.mark.parametrize("more", [[], ["--balanced"]])
def test_labels_are_in_random_order_and_balanced_only_if_asked_for(sample_flags, more):
    y = make_sampler(*sample_flags, "--num-samples", 4000, *more).labels
    counts = np.bincount(y)
    # A pair is a label and the next one.
    pairs = np.bincount(4 * y[:-1] + y[1:], minlength=16)
    assert (counts.tolist() == [1000] * 4) == ("--balanced" in more)
    # Five standard deviations of a binomial distribution, 5 sqrt(4000 p (1 - p)).
    assert np.abs(counts - 1000).max() < 137
    assert np.abs(pairs - 250).max() < 77


def test_what_decides_samples_is_compared_by_content_and_not_by_name(tiny_inception, sample_flags, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=3)
    vae.save_pretrained(tmp_path / "vae")
    save_checkpoint(tmp_path / "run/checkpoints/0000002.pt", vae=str(tmp_path / "vae"), scale=0.5)
    flags = [*sample_flags, "--num-samples", 4, "--out", tmp_path / "mine"]
    figures = evaluate_flags(*flags)
    # The same weights in another folder draw the same pictures.
    vae.save_pretrained(tmp_path / "copy")
    assert evaluate_flags(*flags, "--vae", f"{tmp_path}/copy/") == figures
    # Other weights under the same name draw other pictures.
    haste.load_vae.cache_clear()
    diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=3).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="another way, .* .vae.: name another --out"):
        evaluate_flags(*flags)
    haste.load_vae.cache_clear()


def test_an_mmdit_draws_the_first_captions_of_a_dataset(monkeypatch):
    mmdit = haste.build_model("MMDiT", input_size=8, hidden_size=48, depth=1)
    data = types.SimpleNamespace(names=["a", "b"], captions={"a": ["one", "two"], "b": ["three"]})
    texts = []

    def load_data(folder):
        return data

    def load_ema(path, name):
        return mmdit, {"model": "MMDiT", "vae": None, "scale": 1.0}

    def encode_captions(captions):
        texts.append(captions)
        return torch.ones(len(captions), 2, 768)

    monkeypatch.setattr(haste, "Data", load_data)
    monkeypatch.setattr(haste, "load_ema", load_ema)
    monkeypatch.setattr(haste, "encode_captions", encode_captions)
    flags = "--ckpt m.pt --captions-from D --num-samples 4 --cfg-scale 2 --num-steps 2".split()
    sampler = make_sampler(*flags)
    sampler.sample(range(4))
    captions, null = texts
    assert sorted(captions) == ["one", "one", "three", "three"]
    assert null == [""]
    # Another spelling of the dataset's path means the same captions.
    assert make_sampler(*flags, "--captions-from", "./D").settings == sampler.settings


# ---- evaluate.py: mistakes ---------------------------------------------------------------------------------
# Mistakes are found before anything is drawn.

@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder with good.npz and run.pt, and with what a user might name in their place."""
    folder = tmp_path_factory.mktemp("bad_files")
    images = random_images(6)
    good = save_npz(folder / "good.npz", images)
    save_npz(folder / "float.npz", images / 255)
    save_npz(folder / "nchw.npz", images.transpose(0, 3, 1, 2))
    (folder / "cut.npz").write_bytes(good.read_bytes()[:-200])
    (folder / "empty").mkdir()
    torn = write_pngs(folder / "torn", images) / "0003.png"
    torn.write_bytes(torn.read_bytes()[:99])
    save_as({"w": torch.zeros(3)}, folder, "vit.pth")
    save_checkpoint(folder / "run.pt")
    save_checkpoint(folder / "no_null.pt", cfg_prob=0)
    return folder


@pytest.mark.parametrize("path, words", [
    ("nothing.npz", "nothing.npz"),
    ("float.npz", "float64"),
    ("nchw.npz", "(6, 3, 8, 8)"),
    ("cut.npz", "cut.npz"),
    ("empty", "no images"),
    ("torn", "0003.png cannot be read"),
])
def test_bad_images_get_a_sentence_before_any_sample_is_drawn(
        tiny_inception, bad_files, sampled_batches, monkeypatch, path, words):
    monkeypatch.chdir(bad_files)
    # The mistake must not be met after hours of sampling.
    for flags in (
        f"--samples {path} --ref good.npz --num-workers 0",
        f"--samples {path} --ref good.npz --num-workers 1",
        f"--make-ref {path} --out ref.npz --num-workers 0",
        f"--ckpt run.pt --ref {path} --num-samples 20 --num-workers 0",
    ):
        assert words in complaint(*flags.split(), program=evaluate)
    assert not sampled_batches
    assert not Path("ref.npz").exists()


@pytest.mark.parametrize("flags, words", [
    ("--samples good.npz", "need --ref"),
    ("--ref good.npz", "use one of --ckpt"),
    ("--ckpt vit.pth --ref good.npz", "vit.pth does not name its model"),
    ("--ckpt run.pt nothing.pt --ref good.npz", "nothing.pt: there is no checkpoint"),
    ("--ckpt run.pt --ref good.npz --captions-from .", "other models take no captions"),
    ("--ckpt run.pt --ref good.npz --balanced --num-samples 9", "9 is no multiple of the 4 classes"),
    ("--ckpt run.pt --ref good.npz --guidance-high 0.6", "add --cfg-scale"),
    ("--ckpt run.pt --ref good.npz --num-samples 4 --mode ddpm", "no sampler ddpm"),
    ("--ckpt no_null.pt --ref good.npz --num-samples 4 --cfg-scale 1.5", "without label dropout"),
])
def test_a_mistake_in_evaluates_flags_gets_a_sentence(tiny_inception, bad_files, monkeypatch, flags, words):
    monkeypatch.chdir(bad_files)
    assert words in complaint(*flags.split(), "--num-workers", 0, program=evaluate)


def test_a_damaged_file_of_the_inceptions_weights_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    path = tmp_path / "checkpoints" / evaluate.WEIGHTS
    path.parent.mkdir()
    path.write_bytes(b"PK and a part of the rest")
    with pytest.raises(UserError, match=f"if {path} is damaged, delete it"):
        evaluate.Inception()


def test_samples_of_processes_without_a_common_disk_are_not_measured(
        tiny_inception, sample_flags, monkeypatch):
    # Another process writes its batches elsewhere.
    monkeypatch.setattr(evaluate, "WORLD_SIZE", 2)
    with pytest.raises(UserError, match="holds 12 images instead of 20: all processes need one disk"):
        make_sampler(*sample_flags).draw()


def test_the_record_of_samples_holds_all_that_decides_them(tiny_inception, sample_flags, tmp_path):
    sample_flags += ["--out", tmp_path / "mine", "--balanced"]
    evaluate_flags(*sample_flags, "--num-samples", 8)
    # Twice as many, balanced, would be other labels.
    with pytest.raises(UserError, match="another way, .* .num_samples, labels.: name another"):
        evaluate_flags(*sample_flags, "--num-samples", 16)
    # A weight below the last layer; the scale of latents.
    original = torch.load(sample_flags[1])
    for change, words in (
        (lambda saved: saved["ema"]["blocks.0.mlp.fc1.bias"].add_(1e-3), "weights"),
        (lambda saved: saved["args"].update(vae=None, scale=2.0), "scale"),
    ):
        saved = copy.deepcopy(original)
        change(saved)
        torch.save(saved, sample_flags[1])
        with pytest.raises(UserError, match=f"another way, .* .{words}.: name another"):
            evaluate_flags(*sample_flags, "--num-samples", 8)


def test_a_folder_of_other_images_is_not_drawn_into(tiny_inception, sample_flags, tmp_path):
    photos = write_pngs(tmp_path / "photos", random_images(3))
    with pytest.raises(UserError, match="photos holds images .* by another program"):
        evaluate_flags(*sample_flags, "--out", photos)


def test_figures_of_two_references_are_kept_side_by_side(tiny_inception, sample_flags, tmp_path):
    (tmp_path / "photos").mkdir()
    other = save_npz(tmp_path / "photos/ref.npz", random_images(20, 5))
    flags = [*sample_flags, "--out", tmp_path / "mine"]
    figures = evaluate_flags(*flags)["fid"]
    others = evaluate_flags(*flags, "--ref", other)["fid"]
    assert json.loads((tmp_path / f"mine-{tmp_path.name}-ref.json").read_text())["fid"] == figures
    assert json.loads((tmp_path / "mine-photos-ref.json").read_text())["fid"] == others


# ---- evaluate.py: the demo and the comparison --------------------------------------------------------------
# Both are rows of ordinary commands.

@pytest.fixture
def quick_demo(tiny_inception, monkeypatch, tmp_path):
    """Flags of a demo with two steps of fitting, few letters, and two steps of each sampler."""
    draw_letters = evaluate.draw_letters
    fit = evaluate.fit

    def draw_few_letters(n, seed):
        # The comparison takes the first 1,000 letters of seed 2 as its reference, and measures the others.
        return draw_letters({2: 1040, 3: 20}.get(seed, 40), seed)

    def fit_two_steps(net, loss_of, data, steps):
        return fit(net, loss_of, data, 2)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "draw_letters", draw_few_letters)
    monkeypatch.setattr(evaluate, "fit", fit_two_steps)
    monkeypatch.setattr(evaluate, "SAMPLE_FLAGS", "--num-steps 2 --cfg-scale 2")
    monkeypatch.setattr(evaluate, "MEASURE_FLAGS",
                        "--num-samples 10 --mode heun --num-steps 2 --num-workers 0")
    return "--demo --tau 1 --max-train-steps 2 --checkpointing-steps 1 --sampling-steps 0".split()


def test_the_demo_is_a_row_of_ordinary_commands(quick_demo, capsys):
    evaluate.demo(quick_demo)
    printed = capsys.readouterr().out
    programs = [line.split()[2] for line in printed.splitlines() if line.startswith("$ python ")]
    assert programs == "haste.py haste.py evaluate.py haste.py".split()
    # It reads real letters, and the samples of two checkpoints, which are measured, too.
    assert printed.count("the classifier recognises") == 3
    assert printed.count("\n| runs/demo/checkpoints/") == 2
    phases = [json.loads(line)["phase"] for line in open("runs/demo/metrics.jsonl")]
    assert phases == [1, 2]
    # Three rows of twelve letters.
    size = Image.open("runs/demo/demo.png").size
    assert size == (12 * (6 * 24 + 2) + 2, 3 * (6 * 24 + 2) + 2)
    # A stop leaves another checkpoint, which gets no row.
    shutil.copy("runs/demo/checkpoints/0000002.pt", "runs/demo/checkpoints/0000004.pt")
    evaluate.demo([*quick_demo, "--max-train-steps", "5", "--checkpointing-steps", "5"])
    assert capsys.readouterr().out.count("the classifier recognises") == 3
    assert Image.open("runs/demo/demo.png").size == size


def test_the_comparison_trains_each_variant_once_and_reports_paired_differences(
        quick_demo, monkeypatch, capsys):
    trained = record_calls(monkeypatch, haste, "train")
    quick_demo += "--compare --tau-from 1 --tau-every 1 --tau-images 8 --max-train-steps 3".split()
    evaluate.demo(quick_demo)
    # The same command with another seed trains only what is missing.
    evaluate.demo([*quick_demo, "--seeds", "2"])
    names = [args.exp_name.removeprefix("compare/") for args, in trained]
    variants = "never HASTE-1 HASTE-2 plain REPA attention".split()
    assert names == [f"seed{seed}/{variant}" for seed in (0, 1) for variant in variants]

    results = json.loads(Path("runs/compare/compare.json").read_text())
    assert list(results["cosines"]["0"]) == ["1", "2", "3"]
    runs = results["runs"]
    # Until tau the figures are the same, and then they are not.
    assert runs["HASTE 1"]["0"]["1"] == runs["never"]["0"]["1"]
    assert runs["HASTE 1"]["0"]["3"] != runs["never"]["0"]["3"]
    never, early = [[runs[name][seed]["3"]["L_diff, t > 0.5"] for seed in "01"] for name in ("never", "HASTE 1")]
    differences = np.subtract(never, early)
    error = differences.std(ddof=1) / 2 ** 0.5
    assert f"| 3 | {np.mean(never):.4g} ({differences.mean():+.3g} ± {error:.2g}) |" in capsys.readouterr().out
    has_matplotlib = bool(importlib.util.find_spec("matplotlib"))
    assert Path("runs/compare/compare.png").is_file() == has_matplotlib
    with pytest.raises(UserError, match="other flags: name another --exp-name"):
        evaluate.demo([*quick_demo, "--learning-rate", "0.1"])


def test_the_comparison_finds_wrong_flags_before_it_trains(quick_demo, monkeypatch):
    trained = record_calls(monkeypatch, haste, "train")
    # HASTE 2 is to stop at step 2.
    with pytest.raises(UserError, match="stops HASTE at 1 and 2"):
        evaluate.demo([*quick_demo, "--compare", "--max-train-steps", "1"])
    variants = evaluate.list_variants(1) | {"wrong": "--tau soon"}
    monkeypatch.setattr(evaluate, "list_variants", lambda every: variants)
    with pytest.raises((UserError, SystemExit)):
        evaluate.demo([*quick_demo, "--compare"])
    assert not trained


def test_the_held_out_loss_is_l_diff_at_fixed_times_as_a_whole_and_in_parts(quick_demo):
    class OneMinusT(haste.SiT):
        def forward(self, x, t, y):
            return (1 - t).view(-1, 1, 1, 1).expand_as(x)

    model = OneMinusT(24, 4, 3, 48, 1, 2, 10)
    found = evaluate.held_out_losses(model)
    assert found == evaluate.held_out_losses(model)
    parts = [found["L_diff, t <= 0.1"], found["L_diff, 0.1 < t <= 0.5"], found["L_diff, t > 0.5"]]
    assert found["L_diff"] == pytest.approx(np.dot((0.1, 0.4, 0.5), parts))
    assert parts[0] > parts[2]


# ---- Features together: processes, accumulation, compile, both models, tau, resume -------------------------
# Any of them together, on two processes, trains what one process trains.

PAIRS = {
    "SiT": "",
    "SiT-2-parts": "--gradient-accumulation-steps 2",
    "SiT-4-parts-resumed": "--gradient-accumulation-steps 4 --resume",
    "DiT-4-parts": "--model DiT-XS/2 --gradient-accumulation-steps 4",
    "DiT-2-parts-resumed": "--model DiT-XS/2 --gradient-accumulation-steps 2 --resume",
    "fp16": "--precision fp16",
    "compiled-2-parts": "--gradient-accumulation-steps 2 --compile",
    "auto-compiled-2-parts": "--gradient-accumulation-steps 2 --compile --tau auto --tau-from 2 "
                             "--tau-images 9 --tau-cosine 1",
}


def train_pairs(dataset, out):
    """Trains each of PAIRS, those with --resume in three starts."""
    for name, flags in PAIRS.items():
        flags = ["--batch-size", "16", *flags.split()]
        if "--resume" in flags:
            flags.remove("--resume")
            train(dataset, out / name, *flags, "--max-train-steps", 2)
            train(dataset, out / name, *flags, "--max-train-steps", 4)
        train(dataset, out / name, *flags)


def run_on_two_processes(dataset, home, sample_flags):
    """What each of two processes does for the tests below. Torch is imported once for all."""
    use_aot_eager(pytest.MonkeyPatch())
    # It would leave the group of processes after the first command.
    haste.exit_on_user_error = nullcontext
    train_pairs(dataset, home / "two")

    vars(evaluate).update(TINY_INCEPTION)
    evaluate.main([*sample_flags, *DRAW_FLAGS, "--out", str(home / "two-samples")])

    # As with a disk for each node, of which the first has the checkpoints.
    node = home / f"node{haste.RANK}"
    node.mkdir()
    if haste.RANK == 0:
        shutil.copytree(home / "two/SiT/run", node / "run")
    haste.barrier()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as refused:
        patch.chdir(node)
        train(dataset, ".")
    Path(node, "said.txt").write_text(str(refused.value))

    before = dict(vars(haste))
    for name, number, more in (("urepa", 0, ()), ("warmup", 1, ("--tau", "never"))):
        with suppress(SystemExit):
            exec_block(number, run_flags(dataset, home / name, "--max-train-steps", 4, *more))
        vars(haste).update(before)


DRAW_FLAGS = "--num-samples 42 --num-workers 0".split()


def use_aot_eager(monkeypatch):
    """Compiles by a backend that needs no C compiler, and less time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    # compile_blocks replaces it.
    monkeypatch.setattr(haste, "pair_loss", haste.pair_loss)


@pytest.fixture(scope="module")
def pairs(dataset, tmp_path_factory):
    """The folder in which one process and two processes have trained each of PAIRS."""
    home = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patch:
        use_aot_eager(patch)
        train_pairs(dataset, home / "one")
    script = home / "two.py"
    folders = [str(Path(path).parent) for path in (haste.__file__, __file__)]
    script.write_text(f"import sys\n"
                      f"sys.path[:0] = {folders}\n"
                      f"import {Path(__file__).stem} as tests\n"
                      f"dataset, home, *sample_flags = sys.argv[1:]\n"
                      f"tests.run_on_two_processes(tests.Path(dataset), tests.Path(home), sample_flags)\n")
    run_program([dataset, home, *make_sample_flags(home)], 2, program=script)
    return home


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_do_what_one_does(pairs, name):
    # In fp16 a gradient near 0 can be rounded to either side, and AdamW makes a whole step of it.
    fp16 = name == "fp16"
    losses = [metrics(pairs / processes / name, "loss") for processes in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=0.03 if fp16 else 1e-3)
    assert fp16 or weight_difference(pairs / "one" / name, pairs / "two" / name) < 3e-4
    assert metrics(pairs / "two" / name, "step") == metrics(pairs / "one" / name, "step")


def test_parts_resume_and_compilation_change_nothing(pairs):
    for sit in ("SiT-4-parts-resumed", "compiled-2-parts"):
        assert weight_difference(pairs / "two/SiT-2-parts", pairs / "two" / sit) < 3e-4
    assert weight_difference(pairs / "two/DiT-4-parts", pairs / "two/DiT-2-parts-resumed") < 3e-4


def test_auto_ends_phase_one_at_the_same_step_on_two_processes(pairs):
    for processes in ("one", "two"):
        folder = pairs / processes / "auto-compiled-2-parts"
        assert checkpoint(folder, 6)["tau"] == 2
        assert metrics(folder, "phase") == [1, 1, 2, 2, 2, 2]
    cosines = [metrics(pairs / processes / "auto-compiled-2-parts", "cosines")[0] for processes in ("one", "two")]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-4)


def test_two_processes_draw_and_measure_what_one_does(pairs, tiny_inception, tmp_path):
    one = evaluate_flags(*make_sample_flags(tmp_path), *DRAW_FLAGS, "--out", tmp_path / "one")
    [report] = pairs.glob("two-samples-*.json")
    assert metrics_of(json.loads(report.read_text())) == pytest.approx(one, rel=1e-9)
    assert read_folder(tmp_path / "one") == read_folder(pairs / "two-samples")


def test_processes_that_see_different_checkpoints_do_not_train(pairs):
    for node in ("node0", "node1"):
        said = Path(pairs, node, "said.txt").read_text()
        assert "the processes see different checkpoints" in said
    assert not Path(pairs, "node1/run").exists()


@pytest.mark.parametrize("name", ["urepa", "warmup"])
def test_going_further_runs_on_two_processes(pairs, name):
    assert metrics(pairs / name, "step") == [1, 2, 3, 4]


# ---- README: Going further ---------------------------------------------------------------------------------
# Each script runs as it stands in README, and does what its method is.

def readme_blocks(language):
    """The fenced blocks of a language in README's section "Going further"."""
    text = Path(HASTE).with_name("README.md").read_text()
    section = text.split("## Going further")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def exec_block(number, flags):
    """Runs the block with this number as a program with these flags -> the names that it defines."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["block.py", *to_argv(flags)])
        exec(readme_blocks("python")[number], names)
    return names


@pytest.fixture
def run_block(monkeypatch):
    """exec_block, and at the end of the test haste is what it was before."""
    before = dict(vars(haste))
    monkeypatch.setattr(haste.Data, "condition", haste.Data.condition)
    yield exec_block
    vars(haste).update(before)


def test_going_further_a_third_loss_has_its_own_weight_and_column(dataset, tmp_path, run_block):
    run_block(0, run_flags(dataset, tmp_path))
    assert len(re.findall(r"(?m)^.", readme_blocks("python")[0])) <= 8
    assert metrics(tmp_path, "phase") == [1, 1, 1, 2, 2, 2]
    assert len(metrics(tmp_path, "loss_manifold")) == 3
    for line in metrics(tmp_path)[:3]:
        total = line["loss_diff"] + 0.5 * line["loss_repa"] + 0.5 * line["loss_atta"]
        assert line["loss"] == pytest.approx(total + 3 * line["loss_manifold"], rel=1e-5)
    z, features = torch.randn(2, 2, 3, 5)
    squares = []
    for image_z, image_features in zip(z, features):
        for i in range(3):
            for j in range(3):
                student = F.cosine_similarity(image_z[i], image_z[j], dim=0)
                teacher = F.cosine_similarity(image_features[i], image_features[j], dim=0)
                squares.append((student - teacher) ** 2)
    terms = haste.alignment_losses(z, [], features, [], {"repa": 1, "atta": 0})
    assert terms["manifold"].item() == pytest.approx(sum(squares).item() / 18)


def test_going_further_warmup_trains_the_first_blocks_alone_and_the_run_continues(
        dataset, tmp_path, run_block):
    real_losses = haste.losses
    warmup = ["--tau", "never", "--max-train-steps", 2, "--cfg-prob", 0]
    run_block(1, run_flags(dataset, tmp_path, *warmup))
    assert metrics(tmp_path, "loss_diff") == [0, 0]
    torch.manual_seed(0)
    sizes = dict(input_size=8, in_channels=3, num_classes=4, teacher_dim=24)
    start = haste.build_model("SiT-XS/2", **sizes).state_dict()
    warm = checkpoint(tmp_path, 2)
    for key, x in warm["model"].items():
        # The feature block of the tests' SiT-XS is the third of four.
        behind = key.startswith(("blocks.3", "final_layer", "pos_embed"))
        unused = key.startswith("t_embedder.mlp.0.weight")      # at t = 0 all sines are 0
        if behind:
            assert torch.equal(x, start[key])
        elif not unused:
            assert not torch.equal(x, start[key]) or not start[key].any()
    # The ordinary run goes on from step 2.
    haste.losses = real_losses
    train(dataset, tmp_path)
    assert metrics(tmp_path, "step") == [1, 2, 3, 4, 5, 6]
    assert all(metrics(tmp_path, "loss_diff")[2:])


GMEM, SOFTREPA, REPA_MLP = 2, 3, 4      # their numbers among README's blocks


@pytest.mark.parametrize("number", [GMEM, SOFTREPA, REPA_MLP])
def test_going_further_scripts_are_short(number):
    lines = readme_blocks("python")[number].splitlines()
    assert len(lines) <= 35
    assert max(map(len, lines)) <= 100


def gmem_flags(dataset, folder, out, *more):
    """A run on a copy of the dataset in `folder`, beside which there is room for the bank."""
    return run_flags(dataset, folder / out, "--data-dir", folder / "data", *more)


def test_going_further_gmem_trains_through_tau_and_resumes_to_the_same_bits(dataset, tmp_path, run_block):
    shutil.copytree(dataset / "data", tmp_path / "data")
    # The first run makes the bank, the others find it.
    run_block(GMEM, gmem_flags(dataset, tmp_path, "whole", "--sampling-steps", 6))
    assert metrics(tmp_path / "whole", "phase") == [1, 1, 1, 2, 2, 2]
    assert (tmp_path / "whole/run/samples/0000006.png").is_file()
    for steps in (2, 4, 6):
        run_block(GMEM, gmem_flags(dataset, tmp_path, "stopped", "--max-train-steps", steps))
    assert weight_difference(tmp_path / "whole", tmp_path / "stopped") == 0


def test_going_further_gmem_learns_and_draws_the_banks_class_tokens(
        dataset, tmp_path, monkeypatch, capsys, run_block):
    shutil.copytree(dataset / "data", tmp_path / "data")
    names = run_block(GMEM, gmem_flags(dataset, tmp_path, "", "--tau", 0, "--max-train-steps", 1))
    snippets = torch.load(tmp_path / "data/snippets.pt")
    # The class token by hand, of two images.
    data = haste.Data(tmp_path / "data")
    images = torch.stack([data[i]["image"] for i in (0, 39)])
    teacher = haste.load_teacher(f"{dataset}/teacher.pt", 16, ())
    mean, std = [torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    x = F.interpolate((images / 255 - mean) / std, 32, mode="bicubic")
    tokens = teacher.vit.forward_features(x)[:, 0]
    assert snippets.shape == (40, 24)
    assert torch.allclose(snippets[[0, 39]], tokens, atol=1e-4)

    # Dropout takes single numbers, whatever else is in the batch.
    items = haste.to_device({"index": torch.arange(40)})
    u = torch.rand(40, generator=torch.Generator().manual_seed(0)).to(haste.DEVICE)
    y = names["condition"](data, items, u, 0.1).cpu()
    kept = y != 0
    assert 0.5 < kept.float().mean() < 0.7 and kept.any(dim=1).all()
    assert torch.allclose(y[kept], snippets[kept] / 0.6)
    alone = names["condition"](data, {"index": items["index"][7:9]}, u[7:9], 0.1).cpu()
    assert torch.equal(alone, y[7:9])

    # A grid, of those asked for, or at random; there are 4 classes, but 40 snippets.
    calls = record_calls(monkeypatch, haste, "sample")
    guided = record_calls(monkeypatch, haste.SiT, "null_condition")
    sample = ["--sample", tmp_path / "run/checkpoints/0000001.pt", "--data-dir", tmp_path / "data",
              "--num-steps", 2, "--out", tmp_path / "grid.png"]
    run_block(GMEM, [*sample, "--labels", 39, 0])
    run_block(GMEM, sample)
    conditions = [call[2].cpu() for call in calls]
    assert torch.equal(conditions[0], snippets[[39, 0]])
    assert "image 39, image 0" in capsys.readouterr().out
    assert len(conditions[1]) == 8 and not guided
    assert all((row == snippets).all(dim=1).any() for row in conditions[1])
    # The mean of two is a condition as well.
    model = calls[0][0]
    mean = snippets[:2].mean(0, keepdim=True).to(haste.DEVICE)
    noise = torch.randn(1, 3, 8, 8, device=haste.DEVICE)
    assert haste.sample(model, noise, mean, steps=2).isfinite().all()


def encode_as_noise(texts):
    """In place of CLIP: five tokens of noise for each text, the same each time."""
    encoded = [fixed_normal(zlib.crc32(text.encode()), 5, 768) for text in texts]
    return torch.stack(encoded).to(haste.DEVICE)


@pytest.fixture
def soft(tmp_path, monkeypatch, run_block):
    """A function that learns tokens on four faint images with README's script -> the names it defines."""
    small = haste.CONFIGS["MMDiT"]._replace(
        depth=6, hidden_size=32, num_heads=4, attention_blocks=(1,), feature_block=2, projector_dim=16)
    monkeypatch.setitem(haste.CONFIGS, "MMDiT", small)
    monkeypatch.setattr(haste, "encode_captions", encode_as_noise)
    (tmp_path / "images").mkdir()
    coco = {"images": [], "annotations": []}
    for i, array in enumerate(random_images(4)):
        Image.fromarray(96 + array // 4).save(tmp_path / f"images/{i}.png")
        coco["images"].append({"id": i, "file_name": f"{i}.png"})
        coco["annotations"].append({"image_id": i, "caption": f"image {i}"})
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    prepare(tmp_path / "images", tmp_path / "data", "--captions", tmp_path / "coco.json")
    model = with_fixed_weights(haste.build_model("MMDiT", input_size=8, in_channels=3))
    # Faint samples, noise and velocities: errors not far above 0.07, as a trained model's are.
    model.final_layer.linear.weight.data *= 0.2
    randomness = haste.randomness

    def faint(n, shape, *key):
        t, u, eps, xi = randomness(n, shape, 0)     # the same batch in each step
        return t, u, 0.2 * eps, xi

    monkeypatch.setattr(haste, "randomness", faint)
    path = save_as({"model": model.state_dict(), "steps": 1, "args": {
        "model": "MMDiT", "vae": None, "scale": 1.0, "cfg_prob": 0.1}}, tmp_path, "0000001.pt")
    flags = ["--sample", path, "--data-dir", tmp_path / "data", "--batch-size", 4, "--num-steps", 2,
             "--cfg-scale", 1, "--captions", "a", "b", "--out", tmp_path / "soft.png"]
    return lambda *more: run_block(SOFTREPA, [*flags, *more])


def test_going_further_softrepa_learns_tokens_alone_and_the_loss_falls(
        soft, tmp_path, monkeypatch, capsys):
    calls = record_calls(monkeypatch, haste.Flow, "add_noise")
    names = soft("--max-train-steps", 12, "--learning-rate", 2e-2)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert len(losses) == 12
    assert losses[0] == pytest.approx(math.log(4), abs=0.01)
    assert losses[-1] < losses[0] - 0.02
    # One noise and one time for all images.
    for _, x0, eps, t in calls:
        eps = eps.expand_as(x0)
        assert len(x0) == len(t) == 4 and torch.equal(eps, eps[:1].expand_as(x0)) and (t == t[0]).all()
    # Only the tokens, four in each of the first five blocks.
    before, _ = haste.load_ema(tmp_path / "0000001.pt")
    after = names["model"].state_dict()
    tokens = {key: after.pop(key) for key in list(after) if key.endswith("soft")}
    assert equal_states(dict(before.state_dict()), dict(after))
    assert set(tokens) == {f"joint_blocks.{i}.soft" for i in range(5)}
    assert [x.shape for x in tokens.values()] == 5 * [(4, 32)]
    assert not any(torch.equal(tokens["joint_blocks.0.soft"], x) for x in list(tokens.values())[1:])
    # The samples are others, and the same command draws them again, but does not learn again.
    picture = (tmp_path / "soft.png").read_bytes()
    haste.sample_from(parse_flags(f"--sample {tmp_path}/0000001.pt --num-steps 2 --cfg-scale 1 "
                                  f"--out {tmp_path}/plain.png --captions", "a", "b"))
    assert (tmp_path / "plain.png").read_bytes() != picture
    soft("--max-train-steps", 12)
    assert "step" not in capsys.readouterr().out
    assert (tmp_path / "soft.png").read_bytes() == picture


def test_going_further_softrepas_loss_is_its_naive_double_loop(soft):
    names = soft("--max-train-steps", 1)
    model = names["model"]
    x_t, v = fixed_normal(1, 3, 3, 8, 8), 0.3 * fixed_normal(2, 3, 3, 8, 8)
    t = torch.full((3,), 0.7)
    y = haste.encode_captions(["a", "b", "c"]).cpu()
    x_t, v, t, y = [x.to(haste.DEVICE) for x in (x_t, v, t, y)]
    total = 0
    for i in range(3):
        logits = []
        for j in range(3):
            error = (model(x_t[i:i + 1], t[:1], y[j:j + 1]) - v[i:i + 1]).square().mean().item()
            logits.append(4 * math.exp(-error / 0.07))
        total += math.log(sum(math.exp(x) for x in logits)) - logits[i]
    # Far from log 3: all of it shows.
    assert abs(total / 3 - math.log(3)) > 1e-3
    assert names["contrast"](model, x_t, t, v, y).item() == pytest.approx(total / 3, abs=1e-5)
    # The tokens stand before the text, and come off after the block.
    block = model.joint_blocks[0]
    x, text, c = [fixed_normal(i, *shape).to(haste.DEVICE) for i, shape in enumerate(
        [(2, 16, 32), (2, 5, 32), (2, 32)])]
    with_soft = torch.cat([torch.stack(2 * [block.soft]), text], dim=1)
    expected = haste.JointBlock.forward(block, x, with_soft, c)
    changed = block(x, text, c)
    assert torch.equal(changed[0], expected[0]) and torch.equal(changed[1], expected[1][:, 4:])


def multiplications(function, x):
    """How many multiplications of matrices a module takes for x."""
    with FlopCounterMode(display=False) as counter:
        function(x)
    return counter.get_total_flops() // 2       # it counts the additions, too


def test_going_further_merged_mlps_are_the_trained_ones_in_fewer_multiplications(
        dataset, tmp_path, monkeypatch, run_block):
    load_ema, timms_mlp = haste.load_ema, haste.Mlp
    names = run_block(REPA_MLP, run_flags(dataset, tmp_path))
    assert metrics(tmp_path, "phase") == [1, 1, 1, 2, 2, 2]
    # The teacher's MLPs are as ever, and the student's let a quarter of the channels pass the GELU.
    teacher = haste.load_teacher(f"{dataset}/teacher.pt", 4, (9,))
    assert type(teacher.vit.blocks[0].mlp) is timms_mlp
    model = with_fixed_weights(haste.build_model("SiT-XS/2", input_size=8, in_channels=3, num_classes=4))
    mlp = model.blocks[0].mlp
    x = fixed_normal(3, 2, 5, 32)
    h = mlp.fc1(x).detach()
    for i in range(32):
        h[..., i] = F.gelu(h[..., i], approximate="tanh")
    assert torch.allclose(mlp(x), mlp.fc2(h), atol=1e-6)

    path = save_as({"model": model.state_dict(), "steps": 1, "args": {
        "model": "SiT-XS/2", "vae": None, "scale": 1.0, "cfg_prob": 0.1}}, tmp_path, "0000001.pt")
    calls = record_calls(monkeypatch, haste, "sample")
    run_block(REPA_MLP, ["--sample", path, "--num-steps", 2, "--out", tmp_path / "grid.png"])
    merged, trained = calls[0][0], load_ema(path)[0]
    noise = fixed_normal(4, 4, 3, 8, 8).to(haste.DEVICE)
    labels = torch.arange(4, device=haste.DEVICE)
    samples = [haste.sample(m, noise, labels, steps=4, mode="ode") for m in (merged, trained)]
    assert (samples[0] - samples[1]).abs().max() < 1e-5
    x = x.to(haste.DEVICE)
    for a, b in zip(merged.blocks, trained.blocks, strict=True):
        assert type(a.mlp).__name__ == "MergedMlp" and type(b.mlp).__name__ == "IdleMlp"
        assert (a.mlp(x) - b.mlp(x)).abs().max() < 1e-5
        assert multiplications(a.mlp, x) == 3 * 32 ** 2 * 2 * 5
        assert multiplications(b.mlp, x) == 8 * 32 ** 2 * 2 * 5


# ---- Slow: python -m pytest -m slow ------------------------------------------------------------------------
# Kills at random instants change no bit, and a long run does not grow.

@pytest.mark.slow
@pytest.mark.parametrize("processes, kills", [(0, 12), (2, 6)])
def test_killed_at_random_instants_the_end_is_the_same_bits(dataset, tmp_path, processes, kills):
    rng = np.random.default_rng(0)
    more = ("--max-train-steps", 60, "--tau", 30, "--checkpointing-steps", 5)
    run_program(run_flags(dataset, tmp_path / "whole", *more), processes)
    for _ in range(kills):
        # At the end of the block, the program and torchrun's processes are killed.
        with launch(run_flags(dataset, tmp_path / "killed", *more), processes):
            time.sleep(rng.uniform(4, 12))
    run_program(run_flags(dataset, tmp_path / "killed", *more), processes)
    assert equal_states(checkpoint(tmp_path / "whole", 60), checkpoint(tmp_path / "killed", 60))


def resources(pid):
    """A process's memory in KiB, its threads, and its open files."""
    home = Path(f"/proc/{pid}")
    memory = (home / "status").read_text().split("VmRSS:")[1].split()[0]
    return int(memory), len(os.listdir(home / "task")), len(os.listdir(home / "fd"))


@pytest.mark.slow
def test_memory_threads_and_open_files_do_not_grow(dataset, tmp_path):
    flags = run_flags(dataset, tmp_path, "--max-train-steps", 3000, "--checkpointing-steps", 500,
                      "--num-workers", 1, "--tau", 1500)
    seen = []
    with launch(flags, stderr=subprocess.DEVNULL) as process:
        wait_for_metrics(tmp_path, 1, process)
        while process.poll() is None:
            # These files vanish as the process ends.
            with suppress(FileNotFoundError, IndexError):
                seen.append(resources(process.pid))
            time.sleep(1)
    early = np.median(seen[:10], axis=0)
    late = np.median(seen[-10:], axis=0)
    assert process.returncode == 0
    assert late[0] < 1.1 * early[0]
    assert (late[1:] < early[1:] + 20).all()
