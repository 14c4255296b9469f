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
    Inception's features                        torch-fidelity, where it is installed
    Inception's resize                          TensorFlow 1's formula, to the bit
    runs                                        other runs: resumed, in parts, on two processes, compiled
"""
import argparse
import copy
import importlib.util
import json
import math
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import uuid
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

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
    assert sentence.startswith(f"{program.__name__}.py: ") and "\n" not in sentence
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


def wait_for_checkpoint(out, process):
    """Returns when the run has saved, and so is in the midst of its loop."""
    # A signal that comes earlier, while Python starts, ends it as it ends any program.
    end = time.time() + 100
    while not list((out / "run/checkpoints").glob("*.pt")):
        if process.poll() is not None or time.time() > end:
            process.terminate()
            pytest.fail(f"the run saved nothing, and said: {process.communicate(timeout=60)}")
        time.sleep(0.02)


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
    diff, repa, atta = haste.losses(model, model.diffusion, x0, eps, t, y, (features, qk), 1, 1)
    assert [diff.item(), repa.item(), atta.item()] == close_to([3.124647, -0.002397, 5.951766])
    (diff + 0.5 * repa + 0.5 * atta).backward()
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

class Dino(VisionTransformer):
    """Answers as the hub's DINOv2 does: no resampling, registers behind the class token, a dictionary."""

    def __init__(self, registers):
        super().__init__(**VIT | {"img_size": 21, "patch_size": 3})
        self.registers = nn.Parameter(torch.randn(1, registers, 24))
        self.patch_embed.strict_img_size = False

    def forward_features(self, x):
        class_token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([class_token, self.patch_embed(x)], dim=1) + self.pos_embed
        # Registers have no position, and come between the class token and the patches.
        registers = self.registers.expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        patches = self.norm(x)[:, 1 + registers.shape[1]:]
        return {"x_norm_patchtokens": patches}


@pytest.mark.parametrize("kind", ["dinov2_vitb14", "dinov2_vitb14_reg", "file"])
def test_teacher_returns_features_and_maps_of_the_patches(kind, tmp_path, monkeypatch):
    def load_from_hub(repo, name, **options):
        return Dino(registers=4 if name.endswith("_reg") else 0)

    monkeypatch.setattr(torch.hub, "load", load_from_hub)
    name = kind
    if kind == "file":
        name = save_teacher(tmp_path / "teacher.pt", img_size=14)
    teacher = haste.load_teacher(name, 4, (7, 9, 11))
    attended = record_calls(monkeypatch, F, "scaled_dot_product_attention")     # q, k, v of each block
    normed = record_outputs(teacher.vit.norm)
    features, qk = teacher(to_batch(random_images(2, 0, (20, 20))))
    # The last 16 tokens are the patches. Class and register tokens, which come first, have no partners in the
    # student.
    assert torch.equal(features, normed[0][:, -16:])
    for block, (q, k) in zip((7, 9, 11), qk, strict=True):
        q_used, k_used, _ = attended[block]
        assert torch.equal(q, q_used[:, :, -16:])
        assert torch.equal(k, k_used[:, :, -16:])
    assert not teacher.vit.training
    assert not any(p.requires_grad for p in teacher.parameters())


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


@pytest.mark.parametrize("depth, blocks", [(12, [7, 9, 11]), (24, [19, 21, 23])])
def test_teacher_blocks_keep_their_distance_from_the_last(tmp_path, depth, blocks):
    path = save_teacher(tmp_path / "teacher.pt", depth=depth)
    assert haste.load_teacher(path, 4, (7, 9, 11)).blocks == blocks


def test_teacher_with_too_few_blocks_is_refused_with_those_to_choose_from(tmp_path):
    path = save_teacher(tmp_path / "teacher.pt", depth=4)
    with pytest.raises(UserError, match="no such block among the last 12 of .*choose from 8 to 11"):
        haste.load_teacher(path, 4, (7, 9, 11))
    assert haste.load_teacher(path, 4, (8, 11)).blocks == [0, 3]


# ---- 3. Diffusion: the flow and its samplers ---------------------------------------------------------------

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


def test_paper_protocol_takes_250_evaluations_from_1_to_004():
    model = GaussianVelocity()
    # These are the defaults.
    haste.sample(model, torch.randn(1, 1, 2, 2), torch.tensor([0]))
    times = [t for _, t, _ in model.calls]
    assert times == pytest.approx(np.linspace(1, 0.04, 250).tolist())


# ---- 4. Alignment: the losses ------------------------------------------------------------------------------

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
    (12, 12, 800),      # nearly as many tokens as at 512 px
    (16, 12, 5),        # SiT-XL's: four heads are not aligned
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

    def three_losses(target, lambda_r, lambda_a):
        terms = haste.losses(model, model.diffusion, x0, eps, t, y, target, lambda_r, lambda_a)
        return [x.item() for x in terms]

    _, repa, atta = three_losses(target, 1, 1)
    assert repa != 0 and atta != 0
    assert three_losses(target, 1, 1) == pytest.approx([naive, repa, atta])
    assert three_losses(None, 1, 1) == pytest.approx([naive, 0, 0])
    assert three_losses(target, 0, 1) == pytest.approx([naive, 0, atta])
    assert three_losses(target, 1, 0) == pytest.approx([naive, repa, 0])


# ---- 5. Termination: the trigger ---------------------------------------------------------------------------

class OneWeight(nn.Module):
    """v = w everywhere, z = (w, 1): with features (1, 0), alignment wants a larger w, L_diff w = eps - x0."""

    diffusion = haste.Flow()
    feature_block = 1

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False)])
        nn.init.ones_(self.blocks[0].weight)

    def forward(self, x, t, y, align=False):
        w = self.blocks[0].weight.view(())
        v = w.expand_as(x)
        z = torch.stack([w, torch.ones(())]).expand(len(x), 1, 2)
        return v, z, []


@pytest.mark.parametrize("wish, cosine", [(2.0, 1.0), (0.0, -1.0)])
def test_gradients_of_alignment_and_denoising(wish, cosine):
    x0 = torch.zeros(3, 1, 2, 2)
    features = torch.tensor([1.0, 0.0]).expand(3, 1, 2)
    t = torch.full((3,), 0.5)
    y = torch.zeros(3).long()
    batch = haste.Batch(x0, x0 + wish, t, y, (features, []))
    align, denoise = haste.gradients(OneWeight(), batch, 0.5, 0)
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
        denoise = 1.0 if len(seen) == 1 else -9.0
        return torch.tensor([[1.0], [denoise]])

    monkeypatch.setattr(haste, "gradients", gradients)
    args = parse_flags("--tau-images 10")
    cosines = haste.measure_cosines(OneWeight(), teacher, data, args, step=0, size=5)
    assert cosines == [-1.0] * 4
    assert seen == [5, 5]


# ---- 6. Data -----------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("damaged", [False, True])
def test_exif_orientation_is_heeded_even_beside_damaged_tags(damaged):
    image = Image.fromarray(random_images(1, 0, (2, 4))[0])
    # This orientation is a turn by 90 degrees.
    image.getexif()[0x0112] = 6
    if damaged:
        # This is the resolution.
        image.getexif()[0x011A] = "not a number"
        image.info["exif"] = b"rubbish"
    # The image was 4 wide and 2 high.
    assert haste.to_rgb(image).size == (2, 4)


def test_grey_images_of_16_bits_keep_their_levels():
    # Pillow's own conversion cuts all levels above 255 off.
    image = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert np.asarray(haste.to_rgb(image))[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]


def test_prepare_writes_repas_layout_and_names_what_it_leaves_out(tmp_path, capsys):
    source = tmp_path / "source"
    save_images(source, 8)
    # Notebooks and archives leave such folders and files behind.
    save_images(source / ".ipynb_checkpoints", 4)
    save_images(source / "__MACOSX", 4)
    (source / "class0/._00.png").write_bytes(b"no image")
    (source / "class1/broken.png").write_bytes(b"no image")
    (source / "class1/clip.gif").write_bytes(b"no image")
    # One link leads to another image, and one into a circle.
    (tmp_path / "elsewhere").mkdir()
    Image.new("L", (20, 9)).save(tmp_path / "elsewhere/b.TIF")
    (source / "class3/link").symlink_to(tmp_path / "elsewhere")
    (source / "class3/circle").symlink_to(source / "class3")
    data = prepare(source, tmp_path / "data")
    assert data.classes == ["class0", "class1", "class2", "class3"]
    assert np.bincount(data.labels).tolist() == [2, 2, 2, 3]
    assert data.names[0] == "00000/img00000000.png"
    printed = "".join(capsys.readouterr())
    for words in ("class1/broken.png", "1 unreadable", "clip.gif", "class0, class1"):
        assert words in printed


@pytest.mark.parametrize("files, words", [
    (["a.png"], "put all into one folder"),
    (["train/a/a.png", "val/a/a.png"], "train, val are parts of a dataset; name one of them, such as"),
    (["Train/a.png", "Test/a.png", "validation/a.png"], "are parts of a dataset"),
    (["class0/a.png", "class1/notes.txt"], "no images are in class1"),
    ([], "folder of images"),
])
def test_prepare_refuses_trees_without_classes(tmp_path, files, words):
    (tmp_path / "tree").mkdir()
    for name in files:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    with pytest.raises(UserError, match=words):
        prepare(tmp_path / "tree", tmp_path / "data")


def test_prepare_names_what_is_no_folder_and_what_is_one_class(dataset, tmp_path, capsys):
    archive = tmp_path / "images.zip"
    archive.touch()
    with pytest.raises(UserError, match="images.zip is a file: unpack it, and name the folder"):
        prepare(archive, tmp_path / "data")
    with pytest.raises(UserError, match="nowhere does not exist"):
        prepare(tmp_path / "nowhere", tmp_path / "data")
    prepare(dataset / "images", tmp_path / "data")
    assert "of one class" not in capsys.readouterr().out
    # One folder too high, the folder itself looks like the only class.
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "photos").symlink_to(dataset / "images")
    prepare(tree, tmp_path / "one_class")
    assert "note: all images are of one class, photos" in capsys.readouterr().out


def test_interrupted_prepare_resumes_and_ends_the_same(dataset, tmp_path, monkeypatch):
    real = haste.write_crops
    calls = []

    def write_crops(source, names, out, size, indices):
        calls.append(indices)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(source, names, out, size, indices)

    monkeypatch.setattr(haste, "write_crops", write_crops)
    with pytest.raises(KeyboardInterrupt):
        prepare(dataset / "images", tmp_path / "data")
    with pytest.raises(UserError, match="not a prepared dataset"):
        haste.Data(tmp_path / "data")
    resumed = prepare(dataset / "images", tmp_path / "data")
    # The first batch of 32 is not written again.
    assert len(calls) == 3
    assert len(calls[2]) == 8
    whole = haste.Data(dataset / "data")
    for i in range(40):
        assert torch.equal(resumed[i]["image"], whole[i]["image"])
    with pytest.raises(UserError, match="was started with other --resolution: name a new folder"):
        prepare(dataset / "images", tmp_path / "data", "--resolution", 16)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    (fewer / "class0").symlink_to(dataset / "images/class0")
    with pytest.raises(UserError, match="was started with other images: name a new folder"):
        prepare(fewer, tmp_path / "data")


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


def repa_folder(folder, labels, channels=4):
    """Writes a dataset of 12 latents as REPA's preprocessing does, and returns nothing."""
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(12)]
    (folder / "vae-sd/00000").mkdir(parents=True)
    for name in names:
        np.save(folder / "vae-sd" / name, np.ones((2 * channels, 8, 8), np.float32))
    listing = {"labels": None}
    if labels:
        listing["labels"] = list(zip(names, labels))
    # Some editors put a byte order mark in front of a file.
    (folder / "vae-sd/dataset.json").write_text(json.dumps(listing), "utf-8-sig")


def test_repas_dataset_trains_as_it_is(dataset, tmp_path):
    # Labels come as JSON's numbers or as text, and without names of classes.
    repa_folder(tmp_path, [0, "7", 2.0, 1] * 3)
    data = haste.Data(tmp_path)
    assert data.vae == haste.VAE_ENCODER
    assert data.scale == 0.18215
    assert len(data.classes) == 8
    assert train(dataset, tmp_path, "--data-dir", tmp_path, "--tau", 0) == 0


@pytest.mark.parametrize("labels, channels, words", [
    ([0, None], 4, "img-mean-std-00000001"),
    ([0, 1.5], 4, "whole number"),
    (None, 4, "whole number"),
    ([0, 1], 16, "does not name a VAE of 16 channels"),
])
def test_dataset_with_unusable_labels_or_unknown_vae_is_refused(tmp_path, labels, channels, words):
    repa_folder(tmp_path, labels, channels)
    with pytest.raises(UserError, match=words):
        haste.Data(tmp_path)


def test_damaged_file_of_a_dataset_is_named(dataset, tmp_path):
    prepare(dataset / "images", tmp_path / "data")
    # The start does not read this one; a step does.
    (tmp_path / "data/images/00000/img00000003.png").write_bytes(b"torn")
    with pytest.raises(UserError, match="images/00000/img00000003.png cannot be read"):
        train(dataset, tmp_path, "--data-dir", tmp_path / "data", "--tau", 0)


def test_labels_are_dropped_at_the_rate_of_cfg_prob(dataset):
    data = haste.Data(dataset / "data")
    batch = {"y": torch.ones(20_000).long()}
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = data.condition(batch, u, 0.1).bincount().tolist()
    # Label 4 is the null label.
    assert counts == pytest.approx([0, 18_000, 0, 0, 2000], abs=200)
    assert torch.equal(data.condition(batch, u, 0.0), batch["y"])


# ---- 7. Checkpoints and VAEs -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """The output folder of a run through both phases, with two grids."""
    out = tmp_path_factory.mktemp("trained")
    train(dataset, out, "--sampling-steps", 3, "--cfg-prob", 0.5)
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


def args_of_numpy_and_pathlib(saved):
    saved["args"] |= {"a": np.float64(1), "b": np.int64(3), "c": pathlib.PosixPath("/x")}
    return saved


def args_as_namespace(saved):
    saved["args"] = argparse.Namespace(**saved["args"])
    return saved


def torchs_old_format(saved):
    return saved


NO_PROJECTOR = "has no projector of this run's: it starts from random weights, and the optimizer's state"
NO_OPTIMIZER = "has no optimizer: its state starts from zero"


@pytest.mark.parametrize("change, words", [
    (bare_weights, NO_OPTIMIZER),
    (weights_of_ddp, ""),
    (compiled_weights, ""),
    (without_args, ""),
    (without_ema, NO_OPTIMIZER),
    (without_projector, NO_PROJECTOR),
    (args_of_numpy_and_pathlib, ""),
    (args_as_namespace, ""),
    (torchs_old_format, ""),
])
def test_other_trainers_checkpoints_load_for_sampling_and_as_a_start(
        dataset, trained, tmp_path, capsys, change, words):
    saved = checkpoint(trained, 6) | {"args": {"model": "SiT-XS/2", "num_classes": 4}}
    expected = saved["model" if change is without_ema else "ema"]
    path = save_as(change(saved), tmp_path / "run/checkpoints", "0000000.pt",
                   _use_new_zipfile_serialization=change is not torchs_old_format)

    # Samples come from its EMA.
    model, args = haste.load_ema(path, "SiT-XS/2")
    for key, x in model.state_dict().items():
        if not key.startswith("projectors"):
            assert torch.equal(x, expected[key])
    assert args["vae"] is None
    assert model.num_classes == 4

    # A run starts from it at step 0, as its name says, whatever step is stored in it.
    assert train(dataset, tmp_path) == 0
    assert metrics(tmp_path, "step") == [1, 2, 3, 4, 5, 6]
    printed = capsys.readouterr().out
    assert words in printed
    assert ("starts from" in printed) == (words != "")
    if change is not bare_weights:
        assert "was saved after step 6: by its name, the run continues from 0" in printed


@pytest.mark.parametrize("args, words", [
    ({"path_type": "cosine"}, "its path_type is cosine"),
    ({"path_type": "GVP", "prediction": "velocity"}, "its path_type is GVP"),
    ({"prediction": "noise", "path_type": "Linear"}, "its prediction is noise"),
])
def test_checkpoint_of_another_diffusion_is_refused(trained, tmp_path, args, words):
    state = {"ema": checkpoint(trained, 6)["ema"], "args": args | {"model": "SiT-XS/2"}}
    with pytest.raises(UserError, match=words):
        haste.load_ema(save_as(state, tmp_path))


@pytest.mark.parametrize("key", [
    "decoder_blocks.0.weight",
    "blocks.0.attn.q_norm.w",
])
def test_checkpoint_with_unknown_weights_is_refused_with_the_first_of_them(trained, tmp_path, key):
    state = checkpoint(trained, 6)["ema"] | {key: torch.ones(3)}
    # To leave such a weight out would be to sample from another model.
    with pytest.raises(UserError, match=key):
        haste.load_ema(save_as(state, tmp_path), "SiT-XS/2")


@pytest.mark.parametrize("key", ["projectors.1.0.weight", "projectors.0.0.weight"])
def test_samples_need_no_projector_of_a_known_shape(trained, tmp_path, key):
    # REPA with two teachers has two projectors; others have projectors of another width.
    state = checkpoint(trained, 6)["ema"]
    model, _ = haste.load_ema(save_as(state | {key: torch.ones(3)}, tmp_path), "SiT-XS/2")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in state.items() if "projectors" not in name)


def test_checkpoint_of_another_model_than_the_flags_is_refused(trained, tmp_path):
    path = save_as({"ema": checkpoint(trained, 6)["ema"]}, tmp_path)
    with pytest.raises(UserError, match="name the right --model"):
        haste.load_ema(path, "SiT-S/2")


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("true",)


def test_nothing_in_a_checkpoint_is_unpickled_and_its_type_is_named(tmp_path):
    path = save_as({"model": {}, "args": Payload()}, tmp_path)
    with pytest.raises(UserError, match="posix.system"):
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


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_newest_checkpoint_is_passed_over_by_name(dataset, trained, tmp_path, capsys, damage):
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    intact = (trained / "run/checkpoints/0000004.pt").read_bytes()
    newest = bytearray((trained / "run/checkpoints/0000006.pt").read_bytes())
    half = len(newest) // 2
    if damage == "cut":
        newest = newest[:half]
    else:
        newest[half] ^= 255
    (folder / "0000004.pt").write_bytes(intact)
    (folder / "0000006.pt").write_bytes(newest)
    (folder / "0000008.pt.part").write_bytes(b"what a killed save left")
    # The run goes on from step 4, and ends with the same bits.
    train(dataset, tmp_path, "--cfg-prob", 0.5)
    assert f"skipping damaged checkpoint {folder}/0000006.pt" in capsys.readouterr().out
    assert checkpoints(tmp_path) == ["0000004.pt", "0000006.pt"]
    assert equal_states(checkpoint(tmp_path, 6), checkpoint(trained, 6))


def test_run_whose_checkpoints_are_all_damaged_is_not_started_over(dataset, tmp_path):
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    # To start over would overwrite what might still be saved by hand.
    (folder / "0000004.pt").write_bytes(b"PK cut")
    (folder / "0000006.pt").write_bytes(b"PK cut")
    with pytest.raises(UserError, match="all checkpoints in .* are damaged"):
        train(dataset, tmp_path)
    assert checkpoints(tmp_path) == ["0000004.pt", "0000006.pt"]


@pytest.mark.parametrize("config, words", [
    ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
    ({"_class_name": "AutoencoderKL", "shift_factor": 0.1}, "without shifts"),
])
def test_vae_of_another_kind_is_refused(tmp_path, config, words):
    pytest.importorskip("diffusers")
    # Latents of such a VAE would be scaled and shifted in a wrong way, without an error.
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        haste.load_vae(str(tmp_path))


def test_real_vae_is_loaded_and_checked_for_missing_weights(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    safetensors = pytest.importorskip("safetensors.torch")
    diffusers.AutoencoderKL(block_out_channels=[32], latent_channels=4).save_pretrained(tmp_path)
    vae = haste.load_decoder("any", str(tmp_path), types.SimpleNamespace(in_channels=4))
    assert haste.to_images(torch.randn(2, 4, 8, 8), vae, 0.2).dtype == torch.uint8
    with pytest.raises(UserError, match="4 channels, the model 16"):
        haste.load_decoder("any", str(tmp_path), types.SimpleNamespace(in_channels=16))
    # diffusers replaces a missing weight by random numbers, with no more than a warning.
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
    # Every second step, at tau, and at the end.
    assert checkpoints(trained) == ["0000002.pt", "0000003.pt", "0000004.pt", "0000006.pt"]
    assert metrics(trained, "phase") == [1, 1, 1, 2, 2, 2]
    for line in metrics(trained):
        total = line["loss_diff"] + 0.5 * line["loss_repa"] + 0.5 * line["loss_atta"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert (line["loss_atta"] > 0) == (line["phase"] == 1)
        assert line["images_per_sec"] > 0
    grids = sorted(path.name for path in (trained / "run/samples").iterdir())
    assert grids == ["0000003.png", "0000006.png"]
    assert checkpoint(trained, 6)["args"]["classes"][3] == "class3"


def test_nothing_of_phase_one_runs_after_tau(dataset, latents, tmp_path, monkeypatch):
    teacher = record_calls(monkeypatch, haste.Teacher, "forward")
    images = record_calls(monkeypatch, Image, "open")
    attention = record_calls(monkeypatch, haste, "attention_loss")
    train(dataset, tmp_path, "--data-dir", latents)
    assert len(teacher) == 3
    # The start reads one image, to learn the size.
    assert len(images) == 1 + 3 * 8
    assert len(attention) == 3
    # After tau, the projector and its EMA stay as they are, and all else is trained.
    before = checkpoint(tmp_path, 3)
    after = checkpoint(tmp_path, 6)
    for key in after["model"]:
        stays = key.startswith("projectors") or key == "pos_embed"
        assert torch.equal(before["model"][key], after["model"][key]) == stays
        assert torch.equal(before["ema"][key], after["ema"][key]) == stays


def test_tau_0_never_loads_a_teacher(dataset, tmp_path):
    train(dataset, tmp_path / "plain", "--tau", 0, "--teacher", "no such teacher")
    with pytest.raises(UserError, match="no such teacher"):
        train(dataset, tmp_path / "aligned", "--teacher", "no such teacher")


def test_lambda_a_0_is_repa(dataset, tmp_path, monkeypatch):
    # To call it would be an error.
    monkeypatch.setattr(haste, "attention_loss", None)
    train(dataset, tmp_path, "--tau", "never", "--lambda-a", 0)
    assert all(metrics(tmp_path, "loss_repa"))
    assert not any(metrics(tmp_path, "loss_atta"))


@pytest.mark.parametrize("flag", [
    "--precision=fp32",
    "--precision=fp16",
    "--precision=bf16",
    "--gradient-accumulation-steps=2",
    "--model=DiT-XS/2",
])
def test_resume_is_bit_exact(dataset, tmp_path, flag):
    train(dataset, tmp_path / "whole", flag)
    whole = checkpoint(tmp_path / "whole", 6)
    # It stops before, at and after tau.
    for stop in (2, 3, 4):
        out = tmp_path / f"stopped-at-{stop}"
        train(dataset, out, flag, "--max-train-steps", stop)
        train(dataset, out, flag)
        assert equal_states(whole, checkpoint(out, 6))


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
        diff, repa, atta = real(*args)
        if only in (None, steps[-1]):
            diff = diff * value
        return diff, repa, atta

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


def test_too_many_skipped_steps_in_a_row_end_the_run(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(haste, "MAX_SKIPPED", 3)
    poison(monkeypatch, math.inf)
    with pytest.raises(UserError, match="no finite gradient in 3 steps"):
        train(dataset, tmp_path, "--tau", 0)


def replace_measurement(monkeypatch):
    """The list to which each measurement of the trigger will add its step; its mean cosine is -0.05."""
    asked = []

    def measure_cosines(model, teacher, data, args, step, size):
        asked.append(step)
        return [0.3, 0.3, 0.3, -1.1]

    monkeypatch.setattr(haste, "measure_cosines", measure_cosines)
    return asked


AUTO = ("--tau", "auto", "--tau-from", 2, "--tau-every", 2)


def test_auto_fires_once_and_a_resumed_run_does_not_ask_again(dataset, tmp_path, monkeypatch):
    asked = replace_measurement(monkeypatch)
    train(dataset, tmp_path, *AUTO, "--tau-cosine", -0.04, "--max-train-steps", 3)
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
    assert asked == [2, 4]
    assert checkpoint(tmp_path, 6)["tau"] is None
    assert metrics(tmp_path, "phase") == [1, 1, 1, 1, 1, 1]


def test_compiled_blocks_share_two_graphs_and_give_the_same_losses(dataset, tmp_path, monkeypatch):
    train(dataset, tmp_path / "eager")
    real = nn.Module.compile
    graphs = []
    compiled = []
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        # A real compiler would take minutes.
        return graph.forward

    def compile_module(self, **options):
        compiled.append(type(self))
        real(self, backend=backend, **options)

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    train(dataset, tmp_path / "compiled", "--compile")
    # One graph for each phase, whatever the number of blocks: to compile each of them would take minutes.
    assert len(graphs) <= 2
    assert set(compiled) == {haste.Block}
    eager_losses = metrics(tmp_path / "eager", "loss")
    assert eager_losses == pytest.approx(metrics(tmp_path / "compiled", "loss"), rel=1e-5)


def test_compiling_without_a_compiler_is_one_sentence(dataset, tmp_path, monkeypatch):
    def which(name):
        return None

    monkeypatch.setattr(haste.shutil, "which", which)
    with pytest.raises(UserError, match="install g"):
        train(dataset, tmp_path, "--compile", "--tau", 0)


# ---- 8. Training: signals, failures, flags -----------------------------------------------------------------

@pytest.mark.parametrize("name, processes", [("SIGTERM", 0), ("SIGHUP", 0), ("SIGTERM", 2)])
def test_stop_signal_saves_once_and_asks_to_be_started_again(dataset, tmp_path, name, processes):
    with launch(run_flags(dataset, tmp_path, "--max-train-steps", 100_000), processes) as process:
        wait_for_checkpoint(tmp_path, process)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=60)
    # torchrun ends in an error of its own; now and then it aborts, after its processes have ended.
    assert process.returncode != 0 if processes > 0 else process.returncode == 75, err
    step = metrics(tmp_path, "step")[-1]
    assert checkpoints(tmp_path)[-1] == f"{step:07d}.pt"
    assert f"saved after step {step}; stopped" in out


def test_hangup_that_nohup_ignores_stays_ignored_and_nobody_need_read_the_output(dataset, tmp_path):
    flags = run_flags(dataset, tmp_path, "--max-train-steps", 40)
    with launch(flags, ignored=[signal.SIGHUP], stderr=subprocess.DEVNULL) as process:
        # As when a terminal is closed, to write to it is an error from now on.
        process.stdout.close()
        wait_for_checkpoint(tmp_path, process)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 0
    assert checkpoints(tmp_path)[-1] == "0000040.pt"


def test_signal_ends_a_wait_for_data_and_the_work_is_saved(dataset, tmp_path, monkeypatch, default_signals):
    real = haste.Data.__getitem__
    reads = []

    def read(self, i):
        reads.append(i)
        # The start reads one image, to learn the size; then come two steps of 8, and a part of the third.
        if len(reads) == 1 + 2 * 8 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, i)

    monkeypatch.setattr(haste.Data, "__getitem__", read)
    assert train(dataset, tmp_path, "--checkpointing-steps", 100) == 75
    assert checkpoints(tmp_path) == ["0000002.pt"]
    # After the run, a signal ends the program as before.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_second_ctrl_c_acts_at_once(default_signals):
    with haste.StopSignals() as stop:
        assert stop.caught is False
        assert stop.wait_for(iter(["a batch"])) == "a batch"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.caught is True
        assert stop.wait_for(iter(["a batch"])) is None
        # A signal need not arrive at once, and so it is waited for.
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize("message, words", [
    ("unable to allocate shared memory(shm): No space left on device (28)",
     r"shm-size.*num-workers 0.*No space left on device"),
    ("the disk is gone", r"the data cannot be loaded \(RuntimeError: the disk is gone\)"),
])
def test_failing_loader_ends_with_a_sentence_about_shared_memory(dataset, monkeypatch, message, words):
    def fail(self, i):
        raise RuntimeError(message)

    data = haste.Data(dataset / "data")
    monkeypatch.setattr(haste.Data, "__getitem__", fail)
    loader = haste.DataLoader(data, batch_size=2, num_workers=1, worker_init_fn=haste.ignore_stop_signals)
    with pytest.raises(UserError, match=words):
        next(haste.load_batches(loader))


def test_wandb_gets_a_safe_id_and_its_errors_are_one_sentence(dataset, tmp_path, monkeypatch):
    wandb = types.ModuleType("wandb")
    wandb.run = None
    steps = []

    def init(**options):
        wandb.run = options

    def refuse(**options):
        raise PermissionError("no API key\nrun wandb login")

    def log(line, step):
        steps.append(step)

    wandb.init = init
    wandb.log = log
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(dataset, tmp_path, "--wandb", "project", "--exp-name", "a/b c")
    assert wandb.run["id"] == "a-b-c"
    assert steps == [1, 2, 3, 4, 5, 6]
    wandb.run = None
    wandb.init = refuse
    with pytest.raises(UserError, match="no API key"):
        train(dataset, tmp_path, "--wandb", "project")


def test_checkpoint_of_another_model_is_kept_and_refused(dataset, trained, tmp_path):
    # Whoever forgets to name another run must not lose this one.
    save_as(checkpoint(trained, 6), tmp_path / "run/checkpoints", "0000001.pt")
    sentence = complaint(*run_flags(dataset, tmp_path, "--model", "SiT-XS/4", "--cfg-prob", 0.5))
    assert "another --exp-name" in sentence
    assert checkpoints(tmp_path) == ["0000001.pt"]


def test_processes_that_cannot_find_each_other_are_one_sentence(dataset, tmp_path):
    # So it is when torchrun's variables are set by hand, and the address is forgotten.
    _, err = run_program(run_flags(dataset, tmp_path), code=1, RANK="0", WORLD_SIZE="2")
    assert "start them with torchrun" in err


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_rank_or_world_size_alone_is_a_single_process(monkeypatch, name):
    # Some platforms set one of them for all programs; torchrun sets both.
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "2")
    constants = runpy.run_path(HASTE)
    assert constants["RANK"] == 0
    assert constants["WORLD_SIZE"] == 1


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
    latents_of_512_px = types.SimpleNamespace(shape=(4, 64, 64), captions=None, images=Path("/"))
    haste.resolve(args, latents_of_512_px)
    assert args.model == "SiT-XL/2"
    assert args.tau == 300_000
    assert args.attention_blocks == (4, 5, 6, 7)
    assert args.teacher_blocks == (8, 9, 10, 11)
    assert args.encoder_depth == 8


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


def test_terminal_that_lacks_a_letter_does_not_end_a_run(tmp_path):
    with open(tmp_path / "terminal", "w", encoding="ascii") as terminal:
        haste.Output(terminal).write("caf\u00e9")
    assert (tmp_path / "terminal").read_text() == "caf\\xe9"


# ---- 9. Sampling -------------------------------------------------------------------------------------------

def test_sample_draws_the_labels_asked_for_and_names_their_classes(trained, tmp_path, capsys):
    path = trained / "run/checkpoints/0000006.pt"
    flags = f"--sample {path} --num-steps 2 --out {tmp_path}/grid.png --labels"
    haste.sample_from(parse_flags(flags, 3, 0))
    with Image.open(tmp_path / "grid.png") as grid:
        # These are two images of 8 x 8, with a frame of 1.
        assert grid.size == (2 * 9 + 1, 10)
    assert "3 class3, 0 class0" in capsys.readouterr().out
    assert "classes are 0 to 3" in complaint(*flags.split(), 4)


def test_model_without_label_dropout_cannot_be_guided(dataset, tmp_path):
    # Its own grids are drawn without guidance.
    train(dataset, tmp_path, "--cfg-prob", 0, "--sampling-steps", 6)
    flags = f"--sample {tmp_path}/run/checkpoints/0000006.pt --num-steps 2 --out {tmp_path}/grid.png"
    assert "use --cfg-scale 1" in complaint(*flags.split())
    haste.sample_from(parse_flags(flags, "--cfg-scale", 1))


# ---- 10. DiT and MM-DiT ------------------------------------------------------------------------------------

def test_dits_code_gives_the_same_figures(monkeypatch):
    """Loss, gradients and 12 respaced, guided steps."""
    sizes = dict(input_size=16, in_channels=4, hidden_size=96, num_classes=10)
    model = with_fixed_weights(tiny_model(haste.DiT, **sizes), without="projectors")
    x0 = 0.5 * fixed_normal(1, 3, 4, 16, 16)
    eps = fixed_normal(2, 3, 4, 16, 16)
    t = torch.tensor([0, 0.0375, 0.8])
    y = torch.tensor([3, 7, 1])

    def loss(rows):
        diff, _, _ = haste.losses(model, model.diffusion, x0[rows], eps[rows], t[rows], y[rows], None, 1, 1)
        return diff

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
    diff, _, atta = haste.losses(model, model.diffusion, x0, eps, torch.rand(2), y, target, 1, 1)
    atta.backward(retain_graph=True)
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
    diff.backward()
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
    """The path of COCO's JSON for the dataset's images, with two captions of each."""
    images = []
    captions = []
    for i in range(40):
        images.append({"id": 7 * i, "file_name": f"{i:02d}.png"})
        captions.append({"image_id": 7 * i, "caption": f" image {i} 0 "})
        captions.append({"image_id": 7 * i, "caption": f" image {i} 1 "})
    text = json.dumps({"images": images, "annotations": captions})
    (tmp_path / "coco.json").write_text(text, "utf-8-sig")
    return tmp_path / "coco.json"


def test_captions_are_dropped_and_chosen_by_one_number(dataset, coco, tmp_path):
    data = prepare(dataset / "images", tmp_path / "data", "--captions", coco)
    first = data.captions[data.names[0]]
    last = data.captions[data.names[39]]
    # Below cfg_prob there is no caption; above it, each has half of the interval.
    u = torch.tensor([0.05, 0.1, 0.54, 0.56, 0.999])
    chosen = haste.choose_captions(data, torch.tensor([0, 0, 0, 0, 39]), u, 0.1)
    assert chosen == ["", first[0], first[0], first[1], last[1]]


def test_images_without_captions_are_left_out_and_counted(dataset, coco, tmp_path, capsys):
    coco.write_text(coco.read_text("utf-8-sig").replace('"00.png"', '"none.png"'))
    data = prepare(dataset / "images", tmp_path / "data", "--captions", coco)
    assert len(data) == 39
    assert "1 without captions" in capsys.readouterr().out


def test_captions_of_other_images_are_refused(dataset, coco, tmp_path):
    coco.write_text(coco.read_text("utf-8-sig").replace(".png", ".other"))
    with pytest.raises(UserError, match="has no captions of these images"):
        prepare(dataset / "images", tmp_path / "data", "--captions", coco)


def test_mmdit_trains_through_tau_resumes_and_draws_captions(dataset, clip, coco, tmp_path, capsys):
    prepare(dataset / "images", tmp_path / "data", "--captions", coco)
    flags = ("--data-dir", tmp_path / "data", "--model", "MMDiT")
    train(dataset, tmp_path / "whole", *flags, "--sampling-steps", 6)
    train(dataset, tmp_path / "stopped", *flags, "--max-train-steps", 2)
    train(dataset, tmp_path / "stopped", *flags)
    # The order of captions, too, is a function of seed and step.
    assert weight_difference(tmp_path / "whole", tmp_path / "stopped") == 0
    path = tmp_path / "whole/run/checkpoints/0000006.pt"
    sample = f"--sample {path} --num-steps 2 --out {tmp_path}/grid.png --captions"
    haste.sample_from(parse_flags(sample, "a red bus", "a cat"))
    assert "a red bus, a cat" in capsys.readouterr().out
    with pytest.raises(UserError, match="an MMDiT has no --labels: use --captions"):
        haste.sample_from(parse_flags(f"--sample {path} --num-steps 2 --out {tmp_path}/grid.png --labels 3"))
    flags = parse_evaluate_flags("--ckpt", path, "--captions-from", tmp_path / "data", "--balanced")
    with pytest.raises(UserError, match="--balanced is for classes"):
        evaluate.Sampler(flags)


# ---- evaluate.py: the network and the metrics --------------------------------------------------------------

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
    """The metrics that evaluate.py measures with these flags."""
    return evaluate.evaluate(parse_evaluate_flags(*argv))


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
    measured = evaluate_images(tmp_path, x, y, "--batch-size", 7)
    assert measured == pytest.approx(naive_metrics(TinyInception(), x, y), rel=1e-6)
    # Drawing allows TF32, which would move FID by 0.04.
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


# ---- evaluate.py: images -----------------------------------------------------------------------------------

def test_npz_folder_and_prepared_dataset_give_the_same_figures(tiny_inception, tmp_path, monkeypatch):
    images = random_images(30)
    ref = save_npz(tmp_path / "ref.npz", random_images(40, 1))
    save_npz(tmp_path / "stored.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", labels=np.arange(30), arr_0=images)
    write_pngs(tmp_path / "tree/class", images)
    prepare(tmp_path / "tree", tmp_path / "data")
    reads = record_calls(monkeypatch, zipfile.ZipExtFile, "read")
    found = []
    for name in ("stored.npz", "packed.npz", "tree", "data"):
        for workers in (0, 2):
            found.append(evaluate_flags("--samples", tmp_path / name, "--ref", ref, "--batch-size", 8,
                                        "--num-workers", workers))
    assert found == found[:1] * 8
    # 50,000 images would not fit the memory: what is read at a time is a batch or a header.
    for _, size in reads:
        assert 0 <= size <= 8 * 192


def test_folder_follows_links_and_names_what_it_leaves_out(tmp_path, capsys):
    folder = tmp_path / "samples"
    write_pngs(folder / "0", random_images(4))
    elsewhere = write_pngs(tmp_path / "elsewhere", random_images(4, 1))
    (folder / "1").symlink_to(elsewhere)
    write_pngs(folder / ".cache", random_images(2, 2))
    (folder / "notes.txt").write_text("no image")
    images = evaluate.Folder(folder)
    assert len(images) == 8
    assert torch.equal(images[range(4, 8)], to_batch(random_images(4, 1)))
    assert "skipping 1 files that are no images: notes.txt" in capsys.readouterr().out


@pytest.fixture
def made_ref(tiny_inception, tmp_path):
    """(folder of 30 images, the reference that --make-ref writes of them)."""
    images = write_pngs(tmp_path / "real", random_images(30))
    ref = tmp_path / "sub/ref.npz"
    evaluate_flags("--make-ref", images, "--out", ref)
    return images, ref


def test_a_reference_that_make_ref_wrote_gives_the_same_figures(made_ref, tmp_path, monkeypatch):
    images, ref = made_ref
    samples = save_npz(tmp_path / "samples.npz", random_images(35, 1))
    of_images = evaluate_flags("--samples", samples, "--ref", images)
    assert evaluate_flags("--samples", samples, "--ref", ref) == pytest.approx(of_images, rel=1e-9)
    assert np.array_equal(np.load(ref)["arr_0"], random_images(30))
    # Without precision and recall, arr_0 is not needed.
    monkeypatch.setattr(evaluate.Npz, "__getitem__", None)
    evaluate_flags("--samples", images, "--ref", ref, "--no-prec-recall")


def test_make_ref_stores_a_few_of_many_images_from_all_over(made_ref, monkeypatch):
    images, ref = made_ref
    monkeypatch.setattr(evaluate, "MAX_REFERENCES", 4)
    with pytest.raises(UserError, match="ref.npz exists already: delete it, or name another file"):
        evaluate_flags("--make-ref", images, "--out", ref)
    ref.unlink()
    evaluate_flags("--make-ref", images, "--out", ref)
    assert np.array_equal(np.load(ref)["arr_0"], random_images(30)[[0, 10, 19, 29]])


def test_a_reference_of_statistics_alone_gives_fid_and_sfid(made_ref, tmp_path, capsys):
    images, ref = made_ref
    samples = save_npz(tmp_path / "samples.npz", random_images(35, 1))
    expected = evaluate_flags("--samples", samples, "--ref", images)
    del expected["precision"], expected["recall"]
    statistics = dict(np.load(ref))
    del statistics["arr_0"]
    np.savez(tmp_path / "statistics.npz", **statistics)
    capsys.readouterr()
    measured = evaluate_flags("--samples", samples, "--ref", tmp_path / "statistics.npz")
    assert measured == pytest.approx(expected, rel=1e-9)
    assert "precision and recall are left out" in capsys.readouterr().out


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
    printed = capsys.readouterr().out
    assert "sFID is left out" in printed
    # These programs write such files, of features of another resize.
    assert "pytorch-fid or clean-fid" in printed


def test_statistics_that_samples_bring_are_used_as_adm_uses_them(made_ref, tmp_path):
    _, ref = made_ref
    statistics = dict(np.load(ref))
    del statistics["arr_0"]
    samples = save_npz(tmp_path / "own.npz", random_images(40, 6), **statistics)
    assert abs(evaluate_flags("--samples", samples, "--ref", ref)["fid"]) < 1e-6


def test_what_makes_a_fid_incomparable_is_printed_and_stored(tiny_inception, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "SPLIT_SIZE", 10)
    ref = save_npz(tmp_path / "ref.npz", random_images(20))
    (tmp_path / "samples/class").mkdir(parents=True)
    for i, array in enumerate(random_images(12, 1, (8, 12))):
        Image.fromarray(array).save(tmp_path / f"samples/class/{i}.JPG", "JPEG")
    path = tmp_path / "out.json"
    evaluate_flags("--samples", tmp_path / "samples", "--inception", "random", "--json", path, "--ref", ref)
    printed = capsys.readouterr().out
    notes = json.loads(path.read_text())["notes"]
    expected = ["(8, 12)", "random", "only 12 samples instead of 50,000", "JPEG", "folder by folder"]
    for words, note in zip(expected, notes, strict=True):
        assert words in note
        assert f"note: {note}\n" in printed
    # Of an .npz, only their number is wrong.
    evaluate_flags("--samples", ref, "--ref", ref)
    assert capsys.readouterr().out.count("note: ") == 1


# ---- evaluate.py: samples of a checkpoint ------------------------------------------------------------------

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
    ref = save_npz(tmp_path / "ref.npz", random_images(30))
    path = save_checkpoint(tmp_path / "run/checkpoints/0000002.pt")
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
    folder = tmp_path / "run/eval/0000002-heun-3-cfg-1.5-in-0-0.7-seed-3-20-balanced"
    report = json.loads((tmp_path / "out.json").read_text())
    assert report == json.loads(Path(f"{folder}-ref.json").read_text())
    assert results.items() <= report.items()
    expected = {
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
    assert expected.items() <= report["protocol"].items()
    printed = capsys.readouterr().out
    for name, value in (results | report["protocol"]).items():
        assert f"{name:20} {value}\n" in printed


def test_samples_are_the_emas_and_a_function_of_seed_and_batch(tiny_inception, sample_flags):
    evaluate_flags(*sample_flags)
    sampler = evaluate.Sampler(parse_evaluate_flags(*sample_flags))
    assert equal_states(sampler.model.state_dict(), torch.load(sampler.args.ckpt)["ema"])
    third_batch = evaluate.Folder(sampler.folder)[range(8, 12)]
    assert torch.equal(third_batch, sampler.sample(range(8, 12)))
    sampler.args.seed = 1
    assert not torch.equal(third_batch, sampler.sample(range(8, 12)))


def test_the_sde_does_not_draw_its_starting_noise_again(sample_flags, monkeypatch):
    sampler = evaluate.Sampler(parse_evaluate_flags(*sample_flags))
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
    as_samples = evaluate_flags("--samples", folder, "--ref", tmp_path / "ref.npz", "--batch-size", 4)
    assert as_samples == whole


def test_samples_drawn_in_another_way_are_not_mixed(tiny_inception, sample_flags, sampled_batches, tmp_path):
    folder = tmp_path / "mine"
    flags = [*sample_flags, "--out", folder]
    evaluate_flags(*flags)
    before = read_folder(folder)
    # A flag that is missing here would let two kinds of samples be measured as one.
    others = ("--seed=1 --num-steps=4 --cfg-scale=2 --guidance-high=.5 --mode=ode --balanced "
              "--precision=bf16 --batch-size=5 --num-samples=19")
    for other in others.split():
        with pytest.raises(UserError, match="drawn in another way"):
            evaluate_flags(*flags, other)
    save_checkpoint(tmp_path / "run/checkpoints/0000002.pt", seed=1)
    with pytest.raises(UserError, match="drawn in another way .EMA's checksum.: delete it"):
        evaluate_flags(*flags)
    assert read_folder(folder) == before
    assert len(sampled_batches) == 5


def test_two_processes_draw_and_measure_what_one_does(tiny_inception, sample_flags, tmp_path):
    flags = [*sample_flags, "--num-samples", 42, "--num-workers", 0]
    one = evaluate_flags(*flags, "--out", tmp_path / "one")
    # A program that is evaluate.py with TinyInception in it.
    script = tmp_path / "tiny_evaluate.py"
    folders = [str(Path(path).parent) for path in (evaluate.__file__, __file__)]
    script.write_text(f"import sys; sys.path[:0] = {folders}\n"
                      f"import evaluate, {Path(__file__).stem} as tests\n"
                      f"vars(evaluate).update(tests.TINY_INCEPTION)\n"
                      f"evaluate.main()\n")
    out, _ = run_program([*flags, "--out", tmp_path / "two"], processes=2, program=script)
    assert out.count("\nrecall ") == 1
    two = json.loads((tmp_path / "two-ref.json").read_text())
    assert {key: two[key] for key in one} == pytest.approx(one, rel=1e-9)
    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")


@pytest.mark.parametrize("more", [[], ["--balanced"]])
def test_labels_are_in_random_order_and_balanced_only_if_asked_for(sample_flags, more):
    y = evaluate.Sampler(parse_evaluate_flags(*sample_flags, "--num-samples", 4000, *more)).labels
    counts = np.bincount(y)
    # A pair is a label and the next one.
    pairs = np.bincount(4 * y[:-1] + y[1:], minlength=16)
    assert (counts.tolist() == [1000] * 4) == ("--balanced" in more)
    # Five standard deviations of a binomial distribution, 5 sqrt(4000 p (1 - p)).
    assert np.abs(counts - 1000).max() < 137
    assert np.abs(pairs - 250).max() < 77


def test_latents_are_decoded_by_the_vae_that_the_protocol_names(tiny_inception, sample_flags, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    vae = str(tmp_path / "vae")
    diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=3).save_pretrained(vae)
    save_checkpoint(tmp_path / "run/checkpoints/0000002.pt", vae=vae, scale=0.5)
    evaluate_flags(*sample_flags, "--num-samples", 4, "--out", tmp_path / "mine")
    assert json.loads((tmp_path / "mine.json").read_text())["VAE"] == vae
    # Other weights under the same name draw other pictures.
    haste.load_vae.cache_clear()
    diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=3).save_pretrained(vae)
    with pytest.raises(UserError, match="another way .VAE's checksum.: delete it"):
        evaluate_flags(*sample_flags, "--num-samples", 4, "--out", tmp_path / "mine")
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
    sampler = evaluate.Sampler(parse_evaluate_flags(*flags))
    sampler.sample(range(4))
    captions, null = texts
    assert sorted(captions) == ["one", "one", "three", "three"]
    assert null == [""]


# ---- evaluate.py: mistakes ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder with good.npz and run.pt, and with what a user might name in their place."""
    folder = tmp_path_factory.mktemp("bad_files")
    images = random_images(6)
    good = save_npz(folder / "good.npz", images)
    save_npz(folder / "float.npz", images / 255)
    save_npz(folder / "nchw.npz", images.transpose(0, 3, 1, 2))
    save_npz(folder / "three.npz", images[:3])
    np.savez(folder / "other_net.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (folder / "cut.npz").write_bytes(good.read_bytes()[:-200])
    (folder / "empty").mkdir()
    write_pngs(folder / "mixed", [*images, *random_images(1, 0, (9, 8))])
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
    ("three.npz", "holds 3 images"),
    ("cut.npz", "cut.npz"),
    ("empty", "no images"),
    ("mixed", "0006.png has the size [9, 8], and 0000.png [8, 8]"),
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


def test_samples_of_two_sizes_are_refused_before_the_reference_is_measured(
        tiny_inception, bad_files, monkeypatch):
    monkeypatch.chdir(bad_files)
    measured = record_calls(monkeypatch, evaluate, "measure")
    words = complaint("--samples", "mixed", "--ref", "good.npz", "--num-workers", 0, program=evaluate)
    assert "0006.png has the size [9, 8]" in words
    assert not measured


@pytest.mark.parametrize("flags, words", [
    ("--samples good.npz --ref other_net.npz", "mu [2048], sigma [2048, 2048] must be of 24"),
    ("--samples good.npz", "need --ref"),
    ("--ref good.npz", "use one of --ckpt"),
    ("--ckpt vit.pth --ref good.npz", "vit.pth does not name its model"),
    ("--ckpt vit.pth --ref good.npz --model SiT-XS/4", "vit.pth holds no weights of a SiT-XS/4"),
    ("--ckpt run.pt --ref good.npz --captions-from .", "is for an MMDiT"),
    ("--ckpt run.pt --ref good.npz --num-samples 4 --mode ddpm", "no sampler ddpm"),
    ("--ckpt run.pt --ref good.npz --num-samples 4 --out good.npz/below", "good.npz"),
    ("--ckpt no_null.pt --ref good.npz --num-samples 4 --cfg-scale 1.5", "without label dropout"),
])
def test_a_mistake_in_evaluates_flags_gets_a_sentence(tiny_inception, bad_files, monkeypatch, flags, words):
    monkeypatch.chdir(bad_files)
    assert words in complaint(*flags.split(), "--num-workers", 0, program=evaluate)


def test_another_networks_weights_are_refused(bad_files):
    with pytest.raises(UserError, match="the FID Inception's weights"):
        evaluate.Inception(bad_files / "vit.pth")


# ---- evaluate.py: the demo and the comparison --------------------------------------------------------------

@pytest.fixture
def quick_demo(tiny_inception, monkeypatch, tmp_path):
    """Flags of a demo with two steps of fitting, few letters, and two steps of each sampler."""
    draw_letters = evaluate.draw_letters
    fit = evaluate.fit

    def draw_few_letters(n, seed):
        # The comparison takes the first 1,000 letters of seed 2 as its reference, and measures the others.
        return draw_letters(1100 if seed == 2 else 100, seed)

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
    assert programs == "haste.py haste.py evaluate.py evaluate.py haste.py".split()
    # It reads real letters, and the samples of two checkpoints, of which the last is measured.
    assert printed.count("the classifier recognises") == 3
    assert printed.count("\nrecall ") == 1
    phases = [json.loads(line)["phase"] for line in open("runs/demo/metrics.jsonl")]
    assert phases == [1, 2]
    assert Path("runs/demo/demo.png").is_file()


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
    assert list(results["cosines"]["0"]) == ["1", "2"]
    runs = results["runs"]
    # HASTE continues from the trunk: until tau the figures are the same, and then they are not.
    assert runs["HASTE 2"]["0"]["2"] == runs["never"]["0"]["2"]
    assert runs["HASTE 2"]["0"]["3"] != runs["never"]["0"]["3"]
    never, early = [[runs[name][seed]["3"]["L_diff, t > 0.5"] for seed in "01"] for name in ("never", "HASTE 1")]
    differences = np.subtract(never, early)
    error = differences.std(ddof=1) / 2 ** 0.5
    assert f"| 3 | {np.mean(never):.4g} ({differences.mean():+.2g} ± {error:.2g}) |" in capsys.readouterr().out
    has_matplotlib = bool(importlib.util.find_spec("matplotlib"))
    assert Path("runs/compare/compare.png").is_file() == has_matplotlib
    with pytest.raises(UserError, match="other flags"):
        evaluate.demo([*quick_demo, "--learning-rate", "0.1"])


def test_the_held_out_loss_is_l_diff_at_fixed_times_as_a_whole_and_in_parts(quick_demo):
    class OneMinusT(haste.SiT):
        def forward(self, x, t, y):
            return (1 - t).view(-1, 1, 1, 1).expand_as(x)

    model = OneMinusT(24, 4, 3, 48, 1, 2, 10)
    found = evaluate.held_out_losses(model)
    assert found == evaluate.held_out_losses(model)
    parts = [found["L_diff, t <= 0.1"], found["L_diff, 0.1 < t <= 0.5"], found["L_diff, t > 0.5"]]
    assert found["L_diff"] == approx(np.dot((0.1, 0.4, 0.5), parts))
    assert parts[0] > parts[2]


# ---- Features together: processes, accumulation, compile, both models, tau, resume -------------------------

PAIRS = {
    "SiT": "",
    "SiT-2-parts": "--gradient-accumulation-steps 2",
    "SiT-4-parts-resumed": "--gradient-accumulation-steps 4 --resume",
    "DiT-4-parts": "--model DiT-XS/2 --gradient-accumulation-steps 4",
    "DiT-2-parts-resumed": "--model DiT-XS/2 --gradient-accumulation-steps 2 --resume",
    "fp16": "--precision fp16",
    "auto-2-parts": "--gradient-accumulation-steps 2 --tau auto --tau-from 2 --tau-images 9 --tau-cosine 1",
    "compiled-2-parts": "--gradient-accumulation-steps 2 --compile",
}

# Trains each of PAIRS, those with --resume in two starts, in the processes in which it is run.
TRAIN_PAIRS = """
import sys
import torch.nn as nn
sys.path[:0] = {folders}
import haste, {tests} as tests

compile_module = nn.Module.compile
nn.Module.compile = lambda self, **how: compile_module(self, backend="aot_eager", **how)
dataset, out = tests.Path({dataset!r}), tests.Path({out!r})
with haste.exit_on_user_error("pairs"):
    for name, flags in tests.PAIRS.items():
        flags = ["--batch-size", "16", *flags.split()]
        if "--resume" in flags:
            flags.remove("--resume")
            tests.train(dataset, out / name, *flags, "--max-train-steps", "2")
            tests.train(dataset, out / name, *flags, "--max-train-steps", "4")
        tests.train(dataset, out / name, *flags)
"""


@pytest.fixture(scope="module")
def pairs(dataset, tmp_path_factory):
    """The folder in which one process and two processes have trained each of PAIRS."""
    home = tmp_path_factory.mktemp("pairs")
    folders = [str(Path(path).parent) for path in (haste.__file__, __file__)]
    for name, processes in (("one", 0), ("two", 2)):
        script = home / f"{name}.py"
        script.write_text(TRAIN_PAIRS.format(
            folders=folders, tests=Path(__file__).stem, dataset=str(dataset), out=str(home / name)))
        run_program([], processes, program=script)
    return home


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_do_what_one_does(pairs, name):
    # In fp16 a gradient near 0 can be rounded to either side, and AdamW makes a step of 1e-3 of it.
    bound = 6e-3 if name == "fp16" else 3e-4
    assert weight_difference(pairs / "one" / name, pairs / "two" / name) < bound
    losses = [metrics(pairs / processes / name, "loss") for processes in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert metrics(pairs / "two" / name, "step") == metrics(pairs / "one" / name, "step")


def test_parts_resume_and_compilation_change_nothing(pairs):
    for sit in ("SiT-4-parts-resumed", "compiled-2-parts"):
        assert weight_difference(pairs / "two/SiT-2-parts", pairs / "two" / sit) < 3e-4
    assert weight_difference(pairs / "two/DiT-4-parts", pairs / "two/DiT-2-parts-resumed") < 3e-4


def test_auto_ends_phase_one_at_the_same_step_on_two_processes(pairs):
    for processes in ("one", "two"):
        folder = pairs / processes / "auto-2-parts"
        assert checkpoint(folder, 6)["tau"] == 2
        assert metrics(folder, "phase") == [1, 1, 2, 2, 2, 2]
    cosines = [metrics(pairs / processes / "auto-2-parts", "cosines")[0] for processes in ("one", "two")]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-4)


# ---- Nothing is silently wrong -----------------------------------------------------------------------------

def test_newest_checkpoint_is_the_one_with_the_largest_number(dataset, trained, tmp_path):
    folder = tmp_path / "run/checkpoints"
    for name in ("0000004.pt", "000002.pt"):
        save_as(torch.load(trained / "run/checkpoints/0000004.pt"), folder, name)
    for name in ("notes.pt", "0000009-mine.pt", "best.pt.part"):
        (folder / name).write_text("not a checkpoint of a run")
    assert haste.newest_checkpoint(folder) == folder / "0000004.pt"
    train(dataset, tmp_path, "--cfg-prob", 0.5, "--max-train-steps", 5)
    assert metrics(tmp_path, "step") == [5]
    assert (folder / "0000009-mine.pt").read_text() == "not a checkpoint of a run"
    assert (folder / "best.pt.part").exists()


BAD_FLAGS = {
    # counts
    "--num-steps 0": "0 is not a whole number from 1",
    "--batch-size 0": "0 is not a whole number from 1",
    "--gradient-accumulation-steps 0": "0 is not a whole number from 1",
    "--max-train-steps 1.5": "1.5 is not a whole number from 1",
    "--tau -1": "-1 is neither a step, such as 250000, nor never, nor auto",
    "--tau 1e5": "1e5 is neither a step, such as 250000, nor never, nor auto",
    "--tau-every 0": "0 is not a whole number from 1",
    "--tau-images 0": "0 is not a whole number from 1",
    "--checkpointing-steps 0": "0 is not a whole number from 1",
    "--num-workers -1": "-1 is not a whole number from 0",
    "--seed -1": "-1 is not a whole number from 0",
    "--seed 99999999999999999999": "99999999999999999999 is not a whole number from 0",
    # weights, norms, probabilities, intervals
    "--max-grad-norm -1": "-1 is not a number from 0",
    "--max-grad-norm nan": "nan is not a number from 0",
    "--learning-rate inf": "inf is not a number from 0",
    "--lambda-r -0.5": "-0.5 is not a number from 0",
    "--cfg-prob 1.1": "1.1 is not a number from 0 to 1",
    "--ema-decay 2": "2 is not a number from 0 to 1",
    "--tau-cosine -1.1": "-1.1 is not a number from -1 to 1",
    "--guidance-low 0.28 --guidance-high 5.42": "5.42 is not a number from 0 to 1",
    "--sampling-steps 3 --guidance-low 0.6 --guidance-high 0.4": "use 0 <= --guidance-low <=",
    # choices
    "--precision float16": "invalid choice: 'float16'",
    "--precision bfloat16": "invalid choice: 'bfloat16'",
    "--mode euler": "invalid choice: 'euler'",
    "--sampling-steps 3 --mode ddpm": "no sampler ddpm: use --mode sde or ode or heun",
    "--sampling-steps 3 --model DiT-XS/2 --mode heun": "no sampler heun: use --mode sde or ddpm",
    "--sampling-steps 3 --model DiT-XS/2 --num-steps 1": "from 2 to 1000 steps",
    "--sampling-steps 3 --labels 4": "--labels 4: the classes are 0 to 3",
    "--labels -1": "-1 is not a whole number from 0",
    "--sampling-steps 3 --captions dog": "--captions are for an MMDiT",
    "--model SiT-MMDiT/2": "unknown model SiT-MMDiT/2",
    "--model MMDiT-XL/2": "unknown model MMDiT-XL/2",
    "--model SiT-XL/3": "unknown model SiT-XL/3",
    "--model SiT-XS": "unknown model SiT-XS",
    # blocks
    "--attention-blocks 1 2 6": "SiT-XS/2 has no block 6; the last is 5",
    "--attention-blocks 1 2 -1": "-1 is not a whole number from 0",
    "--teacher-blocks 9 10 12": "12 is not a whole number from 0 to 11",
    "--teacher-blocks 9 10 -1": "-1 is not a whole number from 0 to 11",
    "--teacher-blocks 9": "must have the same length",
    "--encoder-depth 0": "0 is not a whole number from 1",
    "--encoder-depth 7": "--encoder-depth 7: SiT-XS/2 has 6 blocks",
    # flags together
    "--tau auto --lambda-r 0 --lambda-a 0": "leave nothing to align",
    "--tau auto --tau-from 6": "measures first at step 6, and the run ends at 6",
    "--tau auto --tau-from 0 --lambda-r 0 --encoder-depth 5": "which L_ATTA does not reach",
    "--batch-size 7 --gradient-accumulation-steps 2": "must divide into 2 equal parts",
    "--model SiT-XS/8 --data-dir odd": "needs square inputs that divide by 8",
    "--model MMDiT": "needs captions",
    "--compare": "--compare is a part of --demo",
    "--demo --sample run.pt": "--sample: not allowed with argument --demo",
    # files and names
    "--data-dir nowhere": "nowhere is not a prepared dataset",
    "--teacher dinov2_b14": "dinov2_b14 is neither dinov2_vit[s,b,l,g]14[_reg] nor a file",
    "--output-dir teacher.py": "--output-dir teacher.py cannot be written to",
}


@pytest.mark.parametrize("flags, words", BAD_FLAGS.items())
def test_a_wrong_flag_gets_one_sentence_before_the_first_step(dataset, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("teacher.py").touch()
    if "odd" in flags:
        prepare(dataset / "images", "odd", "--resolution", 12)
    assert words in complaint(*run_flags(dataset, tmp_path, *flags.split()))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_each_flag_has_its_own_default_in_the_help_and_none_says_none(capsys):
    for parse in (haste.parse_args, evaluate.parse_args):
        with pytest.raises(SystemExit):
            parse(["--help"])
    printed = capsys.readouterr().out
    assert "(default: None)" not in printed
    assert "(default: False)" not in printed
    assert "(default: 50000)" in printed
    assert "seed of all randomness (default: 0)" in printed


def test_weights_without_args_need_a_model_and_its_name_is_printed(trained, tmp_path, capsys):
    path = save_as(checkpoint(trained, 6)["ema"], tmp_path)
    draw = ["--sample", path, "--num-steps", 2, "--out", tmp_path / "grid.png"]
    assert "does not name its model: use --model" in complaint(*draw)
    haste.main([*map(str, draw), "--model", "SiT-XS/2"])
    assert "it is read as a SiT-XS/2" in capsys.readouterr().out
    # A checkpoint that names its model is read as that, and as no other.
    named = trained / "run/checkpoints/0000006.pt"
    assert "is of a SiT-XS/2, not of a SiT-B/2" in complaint("--sample", named, "--model", "SiT-B/2")
    # These are no weights of a DiT, which has twice as many outputs.
    assert "name the right --model" in complaint(*draw, "--model", "DiT-XS/2")


@pytest.mark.parametrize("args", [{"num_classes": 4}, {}])
def test_table_of_labels_without_a_null_row_is_not_guided(trained, tmp_path, args):
    state = checkpoint(trained, 6)["ema"]
    key = "y_embedder.embedding_table.weight"
    rows = args.get("num_classes", 1000)
    state[key] = torch.randn(rows, 128)
    path = save_as({"ema": state, "args": args | {"model": "SiT-XS/2"}}, tmp_path)
    model, _ = haste.load_ema(path)
    assert model.num_classes == rows
    assert not model.can_be_guided
    draw = f"--sample {path} --num-steps 2 --out {tmp_path}/grid.png"
    assert "use --cfg-scale 1" in complaint(*draw.split())
    haste.sample_from(parse_flags(draw, "--cfg-scale", 1, "--labels", rows - 1))


def test_a_run_past_its_last_step_says_that_there_is_nothing_to_train(dataset, trained, tmp_path, capsys):
    saved = torch.load(trained / "run/checkpoints/0000006.pt")
    save_as(saved, tmp_path / "run/checkpoints", "0000009.pt")
    assert train(dataset, tmp_path, "--cfg-prob", 0.5, "--seed", 9) == 0
    printed = capsys.readouterr().out
    assert "is at step 9, --max-train-steps 6: there is nothing to train" in printed
    assert "from now on" not in printed
    assert checkpoints(tmp_path) == ["0000009.pt"]
    # Another model is another mistake.
    with pytest.raises(UserError, match="0000009.pt is of a SiT-XS/2, not of a SiT-S/2: name the right"):
        train(dataset, tmp_path, "--model", "SiT-S/2")


def test_the_name_of_a_checkpoint_is_its_step(dataset, trained, tmp_path, capsys):
    # README's advice for a start from REPA's file: copy it to 0000000.pt.
    save_as(torch.load(trained / "run/checkpoints/0000006.pt"), tmp_path / "run/checkpoints", "0000000.pt")
    train(dataset, tmp_path, "--cfg-prob", 0.5, "--max-train-steps", 2)
    assert metrics(tmp_path, "step") == [1, 2]
    assert "was saved after step 6: by its name, the run continues from 0" in capsys.readouterr().out


def test_flags_that_change_on_the_way_are_mentioned(dataset, trained, tmp_path, capsys):
    save_as(torch.load(trained / "run/checkpoints/0000002.pt"), tmp_path / "run/checkpoints", "0000002.pt")
    train(dataset, tmp_path, "--cfg-prob", 0.5, "--tau", "never", "--seed", 9)
    printed = capsys.readouterr().out
    assert "note: --tau was 3 until now, and is never from now on" in printed
    assert "note: --seed was 0 until now, and is 9 from now on" in printed
    assert "--batch-size" not in printed


def test_a_grid_that_cannot_be_drawn_does_not_end_a_run(dataset, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise UserError("the samples are not finite")

    monkeypatch.setattr(haste, "sample", fail)
    assert train(dataset, tmp_path, "--sampling-steps", 3) == 0
    assert "0000003.png was not drawn (UserError: the samples are not finite)" in capsys.readouterr().out


def test_a_resumed_run_past_tau_needs_no_images(dataset, latents, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(latents, folder)
    train(dataset, tmp_path, "--data-dir", folder, "--max-train-steps", 4)
    shutil.rmtree(folder / "images")
    assert train(dataset, tmp_path, "--data-dir", folder) == 0
    flags = run_flags(dataset, tmp_path, "--data-dir", folder, "--exp-name", "new")
    assert "phase I needs" in complaint(*flags)


def test_an_ema_that_has_hardly_moved_is_mentioned(trained, tmp_path, capsys):
    haste.load_ema(trained / "run/checkpoints/0000006.pt")
    assert "after 6 steps 100% of the EMA are the weights from before training" in capsys.readouterr().out
    saved = torch.load(trained / "run/checkpoints/0000006.pt")
    haste.load_ema(save_as(saved | {"steps": 50_000}, tmp_path))
    assert capsys.readouterr().out == ""


def change_listing(data, change, folder="images"):
    """Changes the dictionary in a dataset.json."""
    path = data / folder / "dataset.json"
    listing = json.loads(path.read_text())
    change(listing)
    path.write_text(json.dumps(listing))


def test_an_unfinished_encoding_is_not_trained_on_as_pixels(latents, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(latents, folder)
    assert (folder / "images/dataset.json").is_file()
    (folder / "vae-sd/dataset.json").unlink()
    with pytest.raises(UserError, match="vae-sd has no dataset.json, so it is not complete"):
        haste.Data(folder)


def test_labels_beyond_the_classes_are_refused(dataset, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(dataset / "data", folder)
    change_listing(folder, lambda listing: listing.update(classes=["only", "three", "classes"]))
    with pytest.raises(UserError, match="has the label 3, but only 3 classes"):
        haste.Data(folder)
    change_listing(folder, lambda listing: listing["labels"][5].__setitem__(1, -1))
    with pytest.raises(UserError, match="label of 00000/img00000005.png is -1"):
        haste.Data(folder)


def test_labels_with_gaps_are_the_only_ones_that_are_drawn(tiny_inception, dataset, tmp_path):
    # As a subset of ImageNet's classes under ImageNet's numbers.
    folder = tmp_path / "data"
    shutil.copytree(dataset / "data", folder)

    def multiply(listing):
        del listing["classes"]
        listing["labels"] = [[name, 10 * label] for name, label in listing["labels"]]

    change_listing(folder, multiply)
    train(dataset, tmp_path, "--data-dir", folder, "--sampling-steps", 6)
    path = tmp_path / "run/checkpoints/0000006.pt"
    flags = ["--ckpt", path, "--num-samples", 40, "--num-steps", 2]
    for more in ([], ["--balanced"]):
        sampler = evaluate.Sampler(parse_evaluate_flags(*flags, *more))
        assert set(sampler.labels) == {0, 10, 20, 30}
        assert "of the 4 classes that occur in training" in sampler.protocol["labels"]
    draw = ["--sample", path, "--num-steps", 2, "--out", tmp_path / "grid.png", "--labels"]
    haste.main([*map(str, draw), "30"])
    assert "--labels 5: the classes are 0 to 30, with gaps" in complaint(*draw, 5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_prepared_images_of_other_modes_are_read_as_rgb(dataset, tmp_path, mode):
    folder = tmp_path / "data"
    shutil.copytree(dataset / "data", folder)
    for path in folder.glob("images/*/*.png"):
        image = Image.open(path)
        if mode == "I;16":
            image = Image.fromarray(256 * np.asarray(image.convert("L")).astype(np.uint16))
        else:
            image = image.convert(mode)
        image.save(path)
    assert haste.Data(folder)[0]["image"].shape == (3, 8, 8)
    assert train(dataset, tmp_path, "--data-dir", folder, "--max-train-steps", 1) == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_latents_of_other_precisions_train(dataset, latents, tmp_path, dtype):
    folder = tmp_path / "data"
    shutil.copytree(latents, folder)
    for path in folder.glob("vae-sd/*/*.npy"):
        np.save(path, np.load(path)[None].astype(dtype))
    assert haste.Data(folder)[np.int64(3)]["moments"].dtype == torch.float32
    assert train(dataset, tmp_path, "--data-dir", folder, "--max-train-steps", 1) == 0


def test_labels_written_as_text_or_as_true_and_false_are_read(dataset, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(dataset / "data", folder)
    names = [f"00000/img{i:08d}.png" for i in range(4)]
    for labels, expected in (([True, False, True, True], [1, 0, 1, 1]), (["3", "0", "1", "2"], [3, 0, 1, 2])):
        change_listing(folder, lambda listing: listing.update(labels=list(zip(names, labels))))
        assert haste.Data(folder).labels.tolist() == expected


def test_levels_of_16_bits_are_scaled_and_unknown_levels_are_refused_by_name(tmp_path, capsys):
    source = tmp_path / "source/class"
    source.mkdir(parents=True)
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    for order, name in (("<u2", "little.tif"), (">u2", "big.tif"), ("<u2", "grey.png")):
        Image.fromarray(levels.astype(order)).save(source / name)
    Image.fromarray((levels / 65535).astype(np.float32)).save(source / "float.tif")
    Image.fromarray(levels.astype(np.int32)).save(source / "whole.tif")
    for name in ("little.tif", "big.tif", "grey.png"):
        image = haste.to_rgb(Image.open(source / name))
        assert np.array_equal(np.asarray(image)[:, :, 1], levels // 256)
    data = prepare(source.parent, tmp_path / "data")
    assert len(data) == 3
    printed = capsys.readouterr().err
    assert "float.tif (UserError: the levels of mode F have no known range" in printed
    assert "whole.tif (UserError: the levels of mode I have no known range" in printed


def test_the_record_of_samples_holds_all_that_decides_them(tiny_inception, sample_flags, tmp_path):
    sample_flags += ["--out", tmp_path / "mine", "--balanced"]
    evaluate_flags(*sample_flags, "--num-samples", 8)
    # Twice as many, balanced, would be other labels.
    with pytest.raises(UserError, match="another way .number of samples, labels' checksum.: delete it"):
        evaluate_flags(*sample_flags, "--num-samples", 16)
    # A weight below the last layer; the scale of latents; the classes that are drawn.
    original = torch.load(sample_flags[1])
    for change, words in (
        (lambda saved: saved["ema"]["blocks.0.mlp.fc1.bias"].add_(1e-3), "EMA's checksum"),
        (lambda saved: saved["args"].update(vae=None, scale=2.0), "scale"),
        (lambda saved: saved["args"].update(trained_labels=[0, 1]), "labels, labels' checksum"),
    ):
        saved = copy.deepcopy(original)
        change(saved)
        torch.save(saved, sample_flags[1])
        with pytest.raises(UserError, match=f"another way .{words}.: delete it"):
            evaluate_flags(*sample_flags, "--num-samples", 8)


def test_a_folder_of_other_images_is_not_drawn_into(tiny_inception, sample_flags, tmp_path):
    photos = write_pngs(tmp_path / "photos", random_images(3))
    with pytest.raises(UserError, match="photos holds images that this program did not draw"):
        evaluate_flags(*sample_flags, "--out", photos)


def test_figures_of_two_references_are_kept_side_by_side(tiny_inception, sample_flags, tmp_path):
    other = save_npz(tmp_path / "other.npz", random_images(20, 5))
    flags = [*sample_flags, "--out", tmp_path / "mine"]
    figures = evaluate_flags(*flags)["fid"]
    others = evaluate_flags(*flags, "--ref", other)["fid"]
    assert json.loads((tmp_path / "mine-ref.json").read_text())["fid"] == figures
    assert json.loads((tmp_path / "mine-other.json").read_text())["fid"] == others


LISTING_FAULTS = {
    "a label is a list":
        lambda listing: listing.update(labels=[[name, [label]] for name, label in listing["labels"]]),
    "a name occurs twice": lambda listing: listing["labels"].append([listing["labels"][0][0], 3]),
    "the label of 00000/img00000005.png is 2084071":
        lambda listing: listing["labels"][5].__setitem__(1, 2084071),
    "the classes must be a list of their names": lambda listing: listing.update(classes={"a": 0, "b": 1}),
    "the captions of 00000/img00000000.png must be a list of texts":
        lambda listing: listing.update(captions={"00000/img00000000.png": "a dog"}),
    "the captions of 00000/img00000001.png must be a list of texts":
        lambda listing: listing.update(captions={"00000/img00000000.png": ["a dog"]}),
}


@pytest.mark.parametrize("words, change", LISTING_FAULTS.items())
def test_a_listing_that_would_train_something_else_is_refused(dataset, tmp_path, words, change):
    shutil.copytree(dataset / "data", tmp_path / "data")
    change_listing(tmp_path / "data", change)
    with pytest.raises(UserError, match=words):
        haste.Data(tmp_path / "data")


@pytest.mark.parametrize("scale", [0, math.nan, "0.18", None])
def test_latents_without_a_usable_scale_are_refused(latents, tmp_path, scale):
    shutil.copytree(latents, tmp_path / "data")
    change_listing(tmp_path / "data", lambda listing: listing.update(vae="mine", scale=scale), "vae-sd")
    with pytest.raises(UserError, match="the scale of latents must be a number above 0"):
        haste.Data(tmp_path / "data")


def test_latents_with_logarithms_of_the_std_are_refused(latents, tmp_path):
    shutil.copytree(latents, tmp_path / "data")
    for path in (tmp_path / "data").glob("vae-sd/*/*.npy"):
        moments = np.load(path)
        moments[len(moments) // 2:] = -20
        np.save(path, moments)
    with pytest.raises(UserError, match="its std is negative, as a logarithm is"):
        haste.Data(tmp_path / "data")


def test_a_dataset_that_changes_between_two_lives_of_a_run_is_mentioned(dataset, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(dataset / "data", folder)
    train(dataset, tmp_path, "--data-dir", folder, "--max-train-steps", 2)
    train(dataset, tmp_path, "--data-dir", folder, "--max-train-steps", 3)
    words = f"note: {folder} has other images or labels"
    assert words not in capsys.readouterr().out
    change_listing(folder, lambda listing: listing["labels"].pop())
    train(dataset, tmp_path, "--data-dir", folder, "--max-train-steps", 4)
    assert words in capsys.readouterr().out


def test_the_lines_of_a_run_whose_checkpoints_are_gone_are_kept(dataset, tmp_path):
    for steps in (3, 2, 1):
        train(dataset, tmp_path, "--max-train-steps", steps)
        shutil.rmtree(tmp_path / "run/checkpoints")
    assert metrics(tmp_path, "step") == [1]
    old = (tmp_path / "run/metrics.jsonl.old").read_text().splitlines()
    assert [json.loads(line)["step"] for line in old] == [1, 2, 3, 1, 2]


def test_an_optimizer_that_is_not_finite_is_refused(dataset, trained, tmp_path):
    saved = torch.load(trained / "run/checkpoints/0000004.pt")
    first, *_ = saved["opt"]["state"].values()
    first["exp_avg"][0] = math.nan
    path = save_as(saved, tmp_path / "run/checkpoints", "0000004.pt")
    with pytest.raises(UserError, match=f"{path}: exp_avg is not finite"):
        train(dataset, tmp_path, "--cfg-prob", 0.5)


def test_a_run_goes_on_with_a_teacher_of_another_width(dataset, trained, tmp_path, capsys):
    wide = save_teacher(tmp_path / "wide.pt", img_size=8, embed_dim=48)
    saved = torch.load(trained / "run/checkpoints/0000002.pt")
    path = save_as(saved, tmp_path / "run/checkpoints", "0000002.pt")
    assert train(dataset, tmp_path, "--cfg-prob", 0.5, "--teacher", wide) == 0
    assert f"{path} {NO_PROJECTOR}" in capsys.readouterr().out
    assert metrics(tmp_path, "phase") == [1, 2, 2, 2]


def test_processes_that_see_different_checkpoints_do_not_train(dataset, trained, tmp_path, monkeypatch):
    # As with a disk for each node, of which the first has the checkpoints.
    folder = tmp_path / "node0/run/checkpoints"
    save_as(torch.load(trained / "run/checkpoints/0000002.pt"), folder, "0000002.pt")
    script = tmp_path / "nodes.py"
    script.write_text("import os, sys, haste\n"
                      "haste.main([*sys.argv[1:], '--output-dir', 'node' + os.environ['RANK']])\n")
    monkeypatch.chdir(tmp_path)
    with launch(run_flags(dataset, tmp_path), 2, script, PYTHONPATH=str(Path(HASTE).parent)) as process:
        _, err = process.communicate(timeout=60)
    assert "the processes see different checkpoints" in err
    assert [path.name for path in folder.iterdir()] == ["0000002.pt"]


TEACHER_FAULTS = {
    "the mean of its images": {"mean": [123.7, 116.3, 103.5]},
    "the std of its images": {"std": [0.0, 0.5, 0.5]},
    "must be square": {"config": {"img_size": (16, 4), "patch_size": 2}},
    "have three channels": {"config": {"in_chans": 1}},
}


@pytest.mark.parametrize("words, change", TEACHER_FAULTS.items())
def test_a_teacher_that_would_see_other_images_is_refused(tmp_path, words, change):
    change = dict(change)
    path = save_teacher(tmp_path / "teacher.pt", **{"img_size": 8} | change.pop("config", {}))
    torch.save(torch.load(path) | change, path)
    with pytest.raises(UserError, match=words):
        haste.load_teacher(str(path), 4, (9,))


def test_two_student_blocks_can_have_one_partner(dataset, tmp_path):
    assert train(dataset, tmp_path, "--teacher-blocks", 9, 9, 9, "--max-train-steps", 1) == 0


def test_cocos_captions_are_matched_by_path_and_odd_ones_are_left_out(tmp_path):
    names = {1: "a/1.png", 2: "2.png", 3: "3.png"}
    images = [{"id": number, "file_name": name} for number, name in names.items()]
    texts = [(1, "one"), (2, "two"), (2, None), (3, "  "), (9, "of no image")]
    annotations = [{"image_id": number, "caption": text} for number, text in texts]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    found = haste.read_coco(path, ["a/1.png", "b/2.png", "3.png"])
    assert found == {"a/1.png": ["one"], "b/2.png": ["two"]}
    # Two files of one name cannot both be meant.
    assert haste.read_coco(path, ["a/1.png", "b/2.png", "c/2.png"]) == {"a/1.png": ["one"]}


@contextmanager
def locked(folder):
    """Another process holds the folder's lock while the block lasts."""
    code = ("import haste, pathlib, time\n"
            f"lock = haste.lock_folder(pathlib.Path({str(folder)!r}))\n"
            "print('locked', flush=True); time.sleep(100)")
    with launch([code], program="-c", PYTHONPATH=str(Path(HASTE).parent)) as process:
        assert process.stdout.readline() == "locked\n"
        yield


def test_prepare_stays_out_of_its_source_and_out_of_another_programs_way(dataset, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(dataset / "images", source)
    with pytest.raises(UserError, match="is inside of --prepare"):
        prepare(source, source / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/.DS_Store").touch()
    assert len(prepare(source, tmp_path / "data")) == 40
    with locked(tmp_path / "data"), pytest.raises(UserError, match="another program is writing"):
        prepare(source, tmp_path / "data")


def test_two_programs_do_not_draw_into_one_folder(tiny_inception, sample_flags, tmp_path):
    flags = [*sample_flags, "--out", tmp_path / "mine"]
    evaluate_flags(*flags)
    (tmp_path / "mine/000005.png").unlink()
    with locked(tmp_path / "mine"), pytest.raises(UserError, match="another program is writing"):
        evaluate_flags(*flags)
    assert not (tmp_path / "mine/000005.png").exists()


def test_prepare_of_images_that_cannot_be_read_writes_no_dataset(tmp_path):
    source = tmp_path / "source/class"
    source.mkdir(parents=True)
    (source / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of its 1 images can be read"):
        prepare(source.parent, tmp_path / "data")


def test_results_have_a_place_before_the_work_begins(tiny_inception, sample_flags, sampled_batches, tmp_path):
    assert "--json" in complaint(*sample_flags, "--json", tmp_path, program=evaluate)
    assert not sampled_batches
    path = sample_flags[1]
    assert "--out" in complaint("--sample", path, "--out", tmp_path)
    assert "it is a folder" in complaint("--make-ref", tmp_path, "--out", tmp_path, program=evaluate)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_end_in_a_sentence_and_not_in_a_picture(
        tiny_inception, dataset, sample_flags, tmp_path, value):
    saved = torch.load(sample_flags[1])
    saved["ema"]["blocks.0.mlp.fc1.bias"][0] = value
    torch.save(saved, sample_flags[1])
    sentence = "blocks.0.mlp.fc1.bias is not finite"
    assert sentence in complaint(*sample_flags, "--num-workers", 0, program=evaluate)
    draw = ["--sample", sample_flags[1], "--out", tmp_path / "grid.png", "--num-steps", 2]
    assert sentence in complaint(*draw)
    assert not (tmp_path / "grid.png").exists()
    # A teacher's weights, too.
    teacher = torch.load(dataset / "teacher.pt")
    teacher["model"]["blocks.0.mlp.fc1.bias"][0] = value
    torch.save(teacher, tmp_path / "teacher.pt")
    flags = run_flags(dataset, tmp_path / "new", "--teacher", tmp_path / "teacher.pt")
    assert f"teacher.pt: {sentence}" in complaint(*flags)


def test_samples_that_are_not_finite_are_refused():
    model = with_random_weights(tiny_model())
    nn.init.constant_(model.final_layer.linear.bias, 1e38)
    with pytest.raises(UserError, match="samples are not finite"):
        haste.sample(model, torch.randn(1, 3, 8, 8), torch.tensor([0]), steps=4, cfg_scale=9.0)
    with pytest.raises(UserError, match="decoded images are not finite"):
        haste.to_images(torch.full((1, 3, 2, 2), math.nan), None, 1.0)


TEACHERS = {
    "with register tokens": {"reg_tokens": 4},
    "whose positions are of patches alone": {"reg_tokens": 4, "no_embed_class": True},
    "without class token": {"class_token": False, "global_pool": "avg"},
    "with norms of q and k": {"qk_norm": True},
}


@pytest.mark.parametrize("name", TEACHERS)
def test_maps_of_a_teacher_are_the_ones_that_its_attention_used(name, tmp_path, monkeypatch):
    path = save_teacher(tmp_path / "teacher.pt", img_size=12, **TEACHERS[name])
    saved = torch.load(path)
    for key, x in saved["model"].items():       # norms that do something
        if "q_norm.weight" in key:
            x += torch.rand(x.shape)
    torch.save(saved, path)
    teacher = haste.load_teacher(path, 4, (7, 9, 11))
    used = record_calls(monkeypatch, F, "scaled_dot_product_attention")
    features, qk = teacher(to_batch(random_images(2, 0, (20, 20))))
    assert features.shape == (2, 16, 24)
    for b, pair in zip((7, 9, 11), qk):
        for x, all_tokens in zip(pair, used[b]):
            assert torch.equal(x, all_tokens[:, :, -16:])


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


# ---- Nothing fails late, or in other people's words --------------------------------------------------------

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
    assert [loss > 0 for loss in metrics(tmp_path, "loss_atta")] == [True, False, False]
    # A run that was killed right after it goes on in phase II, and keeps the measurement.
    (tmp_path / "run/checkpoints/0000006.pt").unlink()
    train(dataset, tmp_path, *auto, "--teacher", "no such teacher")
    assert [line["step"] for line in metrics(tmp_path)] == [2, 2, 4, 6]


def spoil_latents(data):
    """Makes one latent not finite."""
    path = data / "vae-sd/00000/img-mean-std-00000003.npy"
    moments = np.load(path)
    moments[0, 0, 0] = math.nan
    np.save(path, moments)


def enlarge_latent(data):
    """Gives one latent another size."""
    np.save(data / "vae-sd/00000/img-mean-std-00000003.npy", np.zeros((6, 8, 8), np.float32))


def enlarge_image(data):
    """Gives one image another size."""
    Image.new("RGB", (9, 8)).save(data / "images/00000/img00000003.png")


@pytest.mark.parametrize("damage, words", [
    (spoil_latents, "img-mean-std-00000003.npy holds values that are not finite"),
    (enlarge_latent, r"img-mean-std-00000003.npy has the shape \[6, 8, 8\], and the others \[6, 4, 4\]"),
    (enlarge_image, r"img00000003.png has the shape \[3, 8, 9\], and the others \[3, 8, 8\]"),
])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_of_a_dataset_is_named_and_nothing_else_is_blamed(
        dataset, latents, tmp_path, damage, words, workers):
    folder = tmp_path / "data"
    shutil.copytree(latents, folder)
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        train(dataset, tmp_path, "--data-dir", folder, "--num-workers", workers)
    for guess in ("shm", "learning-rate", "Traceback", "Caught"):
        assert guess not in str(error.value)


def test_a_full_disk_is_named(dataset, tmp_path, monkeypatch):
    # Each write of a checkpoint comes to /dev/full, which answers as a full disk does.
    real_open = open

    def open_full(path, *how):
        if str(path).endswith(".pt.part"):
            os.symlink("/dev/full", path)
        return real_open(path, *how)

    monkeypatch.setattr(haste, "open", open_full, raising=False)
    with pytest.raises(UserError, match="0000002.pt cannot be written .*No space left on device"):
        train(dataset, tmp_path)


RENAMED = {
    "numpy 1": ("numpy._core.multiarray", "numpy.core.multiarray"),
    "numpy 2": ("numpy.core.multiarray", "numpy._core.multiarray"),
    "Python 3.13": ("pathlib\nPosixPath", "pathlib._local\nPosixPath"),
    "Windows": ("pathlib\nPosixPath", "pathlib\nWindowsPath"),
}


@pytest.mark.parametrize("name", RENAMED)
def test_checkpoints_of_other_versions_of_python_and_numpy_load(trained, tmp_path, name):
    args = {"model": "SiT-XS/2", "num_classes": 4, "a": np.float64(1.5), "c": pathlib.PosixPath("x/y")}
    path = save_as({"ema": checkpoint(trained, 6)["ema"], "args": args}, tmp_path)
    before, after = RENAMED[name]
    with zipfile.ZipFile(path) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in files.items():
            archive.writestr(entry, content.replace(before.encode(), after.encode()))
    read = haste.read_checkpoint(path)["args"]
    assert read["a"] == 1.5
    assert read["c"].parts == ("x", "y")


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module."])
def test_nested_prefixes_and_a_state_dict_key_are_understood(trained, tmp_path, prefix):
    weights = checkpoint(trained, 6)["ema"]
    state = {prefix + key: x for key, x in weights.items()}
    path = save_as({"state_dict": state}, tmp_path)
    assert equal_states(haste.read_checkpoint(path, "SiT-XS/2")["ema"], weights)


# ---- Two writers, two lives --------------------------------------------------------------------------------

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


def wait_for_metrics(out, lines):
    """Returns when the run has written so many lines of metrics."""
    path = out / "run/metrics.jsonl"
    end = time.time() + 100
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.time() < end, "the run wrote no metrics"
        time.sleep(0.1)


def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(dataset, tmp_path):
    flags = run_flags(dataset, tmp_path, "--max-train-steps", 100_000, "--checkpointing-steps", 1000)
    with launch(flags, stderr=subprocess.DEVNULL):
        wait_for_metrics(tmp_path, 1)
        assert "another program is writing to" in complaint(*run_flags(dataset, tmp_path))
    # A lock that a killed run leaves behind blocks nobody.
    assert train(dataset, tmp_path) == 0


# ---- Beside other people's code ----------------------------------------------------------------------------

def test_labels_of_the_images_are_written_beside_latents_for_repas_encode(latents):
    of_images, of_latents = [
        json.loads((latents / folder / "dataset.json").read_text()) for folder in ("images", "vae-sd")]
    assert of_images["labels"][7] == ["00000/img00000007.png", 0]
    assert of_latents["labels"][7] == ["00000/img-mean-std-00000007.npy", 0]
    assert [label for _, label in of_images["labels"]] == [label for _, label in of_latents["labels"]]


def test_latents_that_repas_encode_counted_anew_keep_their_images(dataset, tmp_path):
    # One image was damaged, so that the images' numbers have a gap; REPA's encode counts without it.
    (tmp_path / "vae-sd/00000").mkdir(parents=True)
    of_images, of_latents = [], []
    for latent_number, image_number in enumerate([0, 1, 2, 4, 5]):
        array = np.full((8, 8, 3), 10 * image_number, np.uint8)
        image_name = f"00000/img{image_number:08d}.png"
        evaluate.write_png(tmp_path / "images" / image_name, array)
        of_images.append([image_name, image_number // 3])
        latent_name = f"00000/img-mean-std-{latent_number:08d}.npy"
        np.save(tmp_path / "vae-sd" / latent_name, np.full((8, 4, 4), 10 * image_number, np.float32))
        of_latents.append([latent_name, image_number // 3])
    for folder, labels in (("images", of_images), ("vae-sd", of_latents)):
        (tmp_path / folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    data = haste.Data(tmp_path)
    data.with_images = True
    for i in range(5):
        assert data[i]["image"][0, 0, 0] == data[i]["moments"][0, 0, 0]


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


@pytest.mark.parametrize("outputs, expected, mean", [
    (8, [-2.112386, 3.501110, -2.839827, 0.336502], 1.099462),
    (4, [-4.085760, -0.764506, -2.226033, -0.230326], 1.157418),
])
def test_sits_own_weights_sample_with_guidance_as_its_code_does(
        tmp_path, monkeypatch, outputs, expected, mean):
    """Ten Euler steps with guidance 1.8 of willisma/SiT, with learn_sigma true (8 outputs) and false."""
    config = haste.CONFIGS["XS"]._replace(depth=2, hidden_size=48, num_heads=4)
    monkeypatch.setitem(haste.CONFIGS, "XS", config)
    args = argparse.Namespace(model="SiT-XS/2", path_type="Linear", prediction="velocity", num_classes=5)
    model, _ = haste.load_ema(save_as({"ema": sit_weights(outputs), "args": args}, tmp_path))
    assert model.guided_channels == 3
    noise = fixed_normal(9, 2, 4, 8, 8)
    x = haste.sample(model, noise, torch.tensor([3, 1]), steps=10, cfg_scale=1.8, mode="ode")
    assert x[1, :, 5, 3].tolist() == close_to(expected)
    assert x.abs().mean().item() == close_to(mean)


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


# ---- What a person sees ------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_after_the_bar_stands_alone_on_the_last_line(dataset, tmp_path, workers):
    prepare(dataset / "images", tmp_path / "data")
    (tmp_path / "data/images/00000/img00000030.png").write_bytes(b"torn")
    flags = run_flags(dataset, tmp_path, "--data-dir", tmp_path / "data", "--tau", 0)
    flags += ["--num-workers", workers]
    _, err = run_program(flags, code=1)
    last_line = err.replace("\r", "\n").rstrip("\n").split("\n")[-1]
    assert last_line.startswith("haste.py: ")
    assert "img00000030.png cannot be read" in last_line


def test_speed_of_a_line_is_the_whole_runs_without_checkpoints_and_grids(dataset, tmp_path, monkeypatch):
    real_save = torch.save

    def slow_save(*args):
        time.sleep(1)
        real_save(*args)

    monkeypatch.setattr(torch, "save", slow_save)
    train(dataset, tmp_path, "--checkpointing-steps", 1, "--log-every", 3)
    rates = metrics(tmp_path, "images_per_sec")
    # 24 images in two lines; with three seconds of saving in each, it would be less than 8 a second.
    assert len(rates) == 2
    assert min(rates) > 12


def test_speed_of_a_line_is_without_the_triggers_time(dataset, tmp_path, monkeypatch):
    def measure_slowly(*args):
        time.sleep(3)
        return [1.0]

    monkeypatch.setattr(haste, "measure_cosines", measure_slowly)
    train(dataset, tmp_path, "--tau", "auto", "--tau-from", 1, "--tau-every", 100, "--log-every", 6)
    rates = [line["images_per_sec"] for line in metrics(tmp_path) if "images_per_sec" in line]
    # 48 images; with the three seconds, it would be less than 16 a second.
    assert min(rates) > 20


def test_fp32_that_is_asked_for_is_fp32_for_the_teacher_too(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for flags, expected in (("", ("fp32", "bf16")), ("--precision fp32", ("fp32", "fp32"))):
        args = parse_flags(flags)
        haste.join_processes(args)
        assert (args.precision, args.teacher_precision) == expected
    args = parse_evaluate_flags()
    haste.join_processes(args)
    assert args.precision == "fp32"


def test_skipped_steps_in_a_row_count_across_lines_of_the_log(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(haste, "MAX_SKIPPED", 5)
    poison(monkeypatch, math.nan)
    with pytest.raises(UserError, match="no finite gradient in 5 steps in a row"):
        train(dataset, tmp_path, "--tau", 0, "--log-every", 2)


class Notebook:
    """A stdout that can write and flush, and nothing else."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_main_works_in_a_notebook_and_leaves_the_process_as_it_was(dataset, tmp_path, monkeypatch):
    notebook = Notebook()
    monkeypatch.setattr(sys, "stdout", notebook)
    handlers = [signal.getsignal(number) for number in haste.STOP_SIGNALS]
    assert haste.main(run_flags(dataset, tmp_path)) == 0
    assert sys.stdout is notebook
    assert "saved after step 6" in notebook.text
    assert [signal.getsignal(number) for number in haste.STOP_SIGNALS] == handlers


def test_python_x_dev_shows_the_traceback_of_a_user_error(monkeypatch):
    monkeypatch.setattr(haste.sys, "flags", types.SimpleNamespace(dev_mode=True))
    with pytest.raises(UserError, match="nowhere is not a prepared dataset"):
        haste.main(["--data-dir", "nowhere"])


def test_the_program_and_evaluate_meet_in_one_module():
    code = ("import runpy, sys; sys.argv = ['haste.py', '--demo', '--seeds', '0']; "
            f"runpy.run_path({HASTE!r}, run_name='__main__')")
    _, err = run_program([code], code=1, program="-c", PYTHONPATH=str(Path(HASTE).parent))
    # A second module would have another UserError, and this would be a traceback.
    assert err.startswith("haste.py: argument --seeds: 0 is not a whole number")


def test_a_copy_under_another_name_runs_its_own_code(tmp_path):
    copy = tmp_path / "mine.py"
    copy.write_text(Path(HASTE).read_text().replace("is not a prepared dataset", "is not what I want"))
    _, err = run_program(["--data-dir", "nowhere"], code=1, program=copy)
    assert "nowhere is not what I want" in err


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


def test_a_signal_while_a_loader_process_starves_saves_the_work(dataset, tmp_path):
    script = tmp_path / "starving.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(Path(HASTE).parent)!r})\n"
        "import haste\n"
        "read = haste.Data.__getitem__\n"
        "def starve(self, i):\n"
        "    if getattr(self, 'reads', 0) > 2 * 8:\n"
        "        time.sleep(1000)\n"
        "    self.reads = getattr(self, 'reads', 0) + 1\n"
        "    return read(self, i)\n"
        "haste.Data.__getitem__ = starve\n"
        "sys.exit(haste.main())\n")
    flags = run_flags(dataset, tmp_path, "--num-workers", 1, "--checkpointing-steps", 100)
    with launch(flags, program=script) as process:
        wait_for_metrics(tmp_path, 2)
        # By now the run waits for the third batch.
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert checkpoints(tmp_path) == ["0000002.pt"]


# ---- README: Going further ---------------------------------------------------------------------------------

def readme_blocks(language):
    """The fenced blocks of a language in README's section "Going further"."""
    text = Path(HASTE).with_name("README.md").read_text()
    section = text.split("## Going further")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def run_block(monkeypatch):
    """A function that runs the README's block with this number as a program with these flags."""
    for name in ("feature_loss", "losses"):
        monkeypatch.setattr(haste, name, getattr(haste, name))      # to restore what the block replaces

    def run(number, flags):
        monkeypatch.setattr(sys, "argv", ["block.py", *map(str, flags)])
        exec(readme_blocks("python")[number], {})

    return run


def test_going_further_manifold_loss_is_its_naive_loop(dataset, tmp_path, run_block):
    run_block(0, run_flags(dataset, tmp_path))
    assert metrics(tmp_path, "phase") == [1, 1, 1, 2, 2, 2]
    z, features = torch.randn(2, 2, 3, 5)
    squares = []
    for image_z, image_features in zip(z, features):
        for i in range(3):
            for j in range(3):
                student = F.cosine_similarity(image_z[i], image_z[j], dim=0)
                teacher = F.cosine_similarity(image_features[i], image_features[j], dim=0)
                squares.append((student - teacher) ** 2)
    cosine = F.cosine_similarity(z, features, dim=-1).mean()
    assert haste.feature_loss(z, features).item() == pytest.approx((3 * sum(squares) / 18 - cosine).item())


def test_going_further_warmup_trains_the_first_blocks_alone_and_the_run_continues(
        dataset, tmp_path, monkeypatch, run_block):
    real_losses = haste.losses
    warmup = ["--tau", "never", "--max-train-steps", 2, "--cfg-prob", 0]
    run_block(1, run_flags(dataset, tmp_path, *warmup))
    assert metrics(tmp_path, "loss_diff") == [0, 0]
    torch.manual_seed(0)
    sizes = dict(input_size=8, in_channels=3, num_classes=4, teacher_dim=24)
    start = haste.build_model("SiT-XS/2", **sizes).state_dict()
    warm = checkpoint(tmp_path, 2)
    for key, x in warm["model"].items():
        # The feature block of SiT-XS is the fourth.
        behind = key.startswith(("blocks.4", "blocks.5", "final_layer", "pos_embed"))
        unused = key.startswith("t_embedder.mlp.0.weight")      # at t = 0 all sines are 0
        if behind:
            assert torch.equal(x, start[key])
        elif not unused:
            assert not torch.equal(x, start[key]) or not start[key].any()
    # The ordinary run goes on from step 2, with the optimizer and the EMA of the warm-up.
    monkeypatch.setattr(haste, "losses", real_losses)
    real_restore, restored = haste.restore, []

    def restore(saved, *rest):
        restored.append(copy.deepcopy(saved))
        real_restore(saved, *rest)

    monkeypatch.setattr(haste, "restore", restore)
    train(dataset, tmp_path)
    assert equal_states(restored[0]["opt"], warm["opt"])
    assert equal_states(restored[0]["ema"], warm["ema"])
    assert metrics(tmp_path, "step") == [1, 2, 3, 4, 5, 6]
    assert all(metrics(tmp_path, "loss_diff")[2:])


@pytest.mark.parametrize("number, more", [(0, []), (1, ["--tau", "never"])])
def test_going_further_runs_on_two_processes(dataset, tmp_path, number, more):
    script = tmp_path / "block.py"
    script.write_text(readme_blocks("python")[number])
    flags = run_flags(dataset, tmp_path, "--max-train-steps", 4, *more)
    run_program(flags, 2, program=script, PYTHONPATH=str(Path(HASTE).parent))
    assert metrics(tmp_path, "step") == [1, 2, 3, 4]


# ---- Slow: python -m pytest -m slow ------------------------------------------------------------------------

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
        wait_for_checkpoint(tmp_path, process)
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
