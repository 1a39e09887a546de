"""Tests of the analysis of compiled programs, and of the programs for TPUs and GPUs.

The tests of a platform are skipped if its plug-in for JAX is not installed. No test needs a TPU or
a GPU. A program takes about a minute to compile.
"""

import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.config import files
from cnn_jax.models.cnn import CNN
from cnn_jax.system.errors import UserError
from experiments.benchmarks import roofline
from experiments.checks import aot

MODULE = """\
HloModule jit_several, is_scheduled=true

%fused (p0: u8[1000,8,128], p1: s32[4,1]) -> bf16[4,8,128] {
  %p0 = u8[1000,8,128]{2,1,0} parameter(0)
  %p1 = s32[4,1]{1,0} parameter(1)
  %gather.1 = u8[4,8,128]{2,1,0} gather(%p0, %p1), offset_dims={1,2}
  ROOT %convert.1 = bf16[4,8,128]{2,1,0} convert(%gather.1)
}

%body (arguments: (s32[], f32[32])) -> (s32[], f32[32]) {
  %arguments = (s32[], f32[32]{0}) parameter(0)
  %item = f32[32]{0} get-tuple-element(%arguments), index=1
  %all-reduce.1 = f32[32]{0} all-reduce(%item), backend_config={"estimated_cycles":"7"}
  %count = s32[] get-tuple-element(%arguments), index=0
  ROOT %result = (s32[], f32[32]{0}) tuple(%count, %all-reduce.1)
}

ENTRY %main (pixels: u8[1000,8,128], rows: s32[4,1]) -> bf16[4,8,128] {
  %pixels = u8[1000,8,128]{2,1,0} parameter(0)
  %rows = s32[4,1]{1,0} parameter(1)
  %start = (s32[], f32[32]{0}) tuple(%zero, %zeros)
  %loop = (s32[], f32[32]{0}) while(%start), body=%body, LOOP
  %fusion.1 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} fusion(%pixels, %rows), calls=%fused, FUSION
  %near = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(1)} negate(%fusion.1)
  ROOT %copy.1 = bf16[4,8,128]{0,2,1} copy(%near)
}
""".replace("LOOP", 'backend_config={"known_trip_count":{"n":"8"}}').replace(
    "FUSION", 'metadata={op_name="jit(several)/gather"}, backend_config={"estimated_cycles":"100"}'
)


def test_kernels_have_the_bytes_that_they_move():
    kernels = {kernel.name: kernel for kernel in aot.Module(MODULE).kernels()}
    assert list(kernels) == ["all-reduce.1", "fusion.1", "near", "copy.1"]
    all_reduce, fusion = kernels["all-reduce.1"], kernels["fusion.1"]
    # The loop runs eight times.
    assert (all_reduce.calls, all_reduce.bytes, all_reduce.cycles) == (8, 2 * 32 * 4, 7)
    # The fusion reads four rows of the data set, and their numbers.
    assert fusion.bytes == 4 * 8 * 128 * (1 + 2) + 4 * 4
    assert (fusion.cycles, fusion.source) == (100, "jit(several)/gather")
    # Arrays in the memory space 1 are not in main memory.
    assert kernels["near"].bytes == kernels["copy.1"].bytes == 4 * 8 * 128 * 2
    assert kernels["copy.1"].cycles is None


def test_collectives_and_copies_are_found():
    module = aot.Module(MODULE)
    found = [kernel.name for kernel in module.kernels() if kernel.is_collective]
    assert found == ["all-reduce.1"]
    assert [k.name for k in module.kernels() if module.changes_layout(k.name)] == ["copy.1"]


def test_the_results_of_collectives_count_in_any_memory():
    text = MODULE.replace("all-reduce.1 = f32[32]{0}", "all-reduce.1 = f32[32]{0:T(128)S(1)}")
    assert text != MODULE
    sizes = dict.fromkeys(
        ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes"), 0
    )
    compiled = types.SimpleNamespace(
        memory_analysis=lambda: types.SimpleNamespace(**sizes, temp_size_in_bytes=0),
        as_text=lambda: text,
        cost_analysis=dict,
    )
    analysis = aot.analyse(compiled)
    assert analysis.exchanged == 8 * 32 * 4
    assert "; results 0.0 MB" in aot.report(analysis, top=0)


def test_a_program_for_this_machine_is_analysed():
    product = jax.jit(lambda a, b: jnp.sin(a @ b).T)
    analysis = aot.analyse(product.lower(np.ones((8, 16)), np.ones((16, 4))).compile())
    assert analysis.memory["arguments"] == 4 * (8 * 16 + 16 * 4)
    assert analysis.bytes >= 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert analysis.flops >= 2 * 8 * 16 * 4
    assert not analysis.collectives


def test_the_command_names_a_missing_plug_in(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("Unknown topology v5e:3x3")

    monkeypatch.setattr(aot.topologies, "get_topology_desc", fail)
    with pytest.raises(UserError, match=r"--topology=v5e:3x3: Unknown topology .*cnn_jax\[tpu\]"):
        aot.topology_devices("v5e:3x3")


def _require(module, topology):
    """Returns the devices of a topology; skips the test if the plug-in is not installed."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module}, which compiles for {topology}, is not installed")
    return aot.topology_devices(topology)


def _config(batch_size, image_size=224, network="cnn"):
    overrides = {"data.image_size": str(image_size), "model.name": network}
    config = files.load("configs/default.py", overrides)
    config.train.batch_size = batch_size
    return config


def _compile(name, devices, config):
    function, arguments = aot.abstract_programs(config, devices)[name]
    return aot.analyse(function.lower(*arguments).compile())


@pytest.fixture(scope="module")
def tpu_step():
    """The analysis of the training step on four TPUs v5e with 128 images each."""
    return _compile("train_step", _require("libtpu", "v5e:2x2"), _config(4 * 128))


@pytest.fixture(scope="module")
def gpu_step():
    """The analysis of the training step on an H100 with 256 images."""
    return _compile("train_step", _require("jax_cuda13_plugin", "h100"), _config(256))


def test_the_tpu_step_does_not_copy_the_data_set(tpu_step):
    data_set = 10_000 * 224 * 224 * 3
    assert tpu_step.memory["arguments"] < 1.02 * data_set
    assert max(kernel.bytes for kernel in tpu_step.kernels) < data_set
    assert sum(kernel.bytes for kernel in tpu_step.copies) < 0.5e9


def test_the_tpu_step_sums_the_gradients_of_kernels_in_float32(tpu_step):
    types = [kernel.type for kernel in tpu_step.collectives]
    # BatchNorm has two all-reduces for each of its three layers. The others are those of the
    # metrics, of the gradients of the dense layer (bfloat16), and of all other gradients.
    assert len(types) == 9
    kernels = [text for text in types if "[3,3," in text]
    assert len(kernels) == 1
    for shape in ("[3,3,3,32]", "[3,3,32,64]", "[3,3,64,128]"):
        assert f"f32{shape}" in kernels[0]


def test_the_tpu_step_stays_within_its_budget(tpu_step):
    """XLA estimated 91.8 M cycles for an earlier form of the step."""
    assert tpu_step.cycles < 46e6
    assert tpu_step.flops > 0


def test_the_gpu_step_stays_within_its_budget(gpu_step):
    """An earlier form of the step moved 17.1 GB in 111 kernels."""
    work = roofline.total(
        roofline.training_passes(CNN(num_classes=10), 224, 256, activation_bytes=2)
    )
    assert work.bytes < gpu_step.bytes < 13e9
    assert len(gpu_step.kernels) < 110
    assert gpu_step.memory["temporary"] < 2.6e9
    assert not gpu_step.collectives


@pytest.mark.parametrize("name", ["train_steps", "eval_step", "prediction"])
def test_the_other_programs_compile_for_a_gpu(name):
    devices = _require("jax_cuda13_plugin", "h100")
    analysis = _compile(name, devices, _config(8, image_size=32))
    assert analysis.kernels


def test_a_pretrained_network_compiles_for_a_gpu():
    devices = _require("jax_cuda13_plugin", "h100")
    analysis = _compile("train_step", devices, _config(8, image_size=64, network="resnet18"))
    convolutions = [kernel for kernel in analysis.kernels if "conv" in kernel.opcode]
    assert len(convolutions) >= 20
