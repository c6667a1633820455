"""What `fulltune selfcheck` says and asks where there are cards, of NVIDIA or AMD."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from fulltune import selfcheck as checks
from fulltune.selfcheck import NotHere, describe_environment, devices_to_check
from fulltune.system import hardware
from fulltune.train.parent import spawn
from tests.gpu_paths.cards import Cards

CPU, CUDA = "cpu", "cuda"
Patch = pytest.MonkeyPatch
named = pytest.mark.stand_in("torch.cuda and torch.version patched", card="that the driver says so")


@named
def test_devices_of_each_maker_are_found(two_h100s: Cards, monkeypatch: Patch) -> None:
    assert devices_to_check() == (CPU, CUDA)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert devices_to_check() == (CPU, "rocm")


@named
def test_checks_of_a_rocm_card_ask_torch_for_cuda(monkeypatch: Patch) -> None:
    asked = list[str]()
    monkeypatch.setattr(checks, "devices_to_check", lambda: (CPU, "rocm"))
    monkeypatch.setattr(checks, "describe_environment", dict)
    monkeypatch.setattr(checks, "CHECKS", (("a stand-in", lambda one: (not asked.append(one), "well")),))
    assert [one.device for one in checks.run_checks().findings] == [CPU, "rocm"]
    assert asked == [CPU, CUDA]


@named
def test_page_names_each_card(an_a100_and_a_t4: Cards, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(hardware, "cpu_bf16_speedup", lambda: 1.5)
    monkeypatch.setattr(hardware, "cpu_rates", lambda: (80.5e9, 20.1e9, 0.0))
    found = describe_environment()
    assert found["gpu 0"] == "NVIDIA A100-SXM4-40GB (compute capability 8.0), 40 GiB, CUDA 13.0"
    assert found["gpu 1"] == "Tesla T4 (compute capability 7.5), 16 GiB, CUDA 13.0"
    assert "gpu" not in found
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert describe_environment()["gpu 1"].endswith("ROCm 6.3")


@named
def test_page_says_where_there_is_none(monkeypatch: Patch) -> None:
    monkeypatch.setenv("FULLTUNE_BF16_SPEEDUP", "1.5")
    monkeypatch.setenv("FULLTUNE_CPU_RATES", "80.5 20.1")
    assert devices_to_check() == (CPU,)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    found = describe_environment()
    assert found["gpu"] == "not visible to torch"
    assert found["set"].endswith("HIP_VISIBLE_DEVICES=1")


@pytest.mark.stand_in("the comparison itself replaced", card="flash and cuDNN kernels")
def test_kernels_for_16_bits_are_compared_in_16_bits_on_a_gpu(monkeypatch: Patch) -> None:
    monkeypatch.setattr(checks, "compare_with_eager", lambda *asked: asked)
    assert checks.check_sdpa(CUDA, "flash") == ("cuda", "sdpa", "bf16")
    assert checks.check_sdpa(CUDA, "math") == ("cuda", "sdpa", "fp32")
    assert checks.check_sdpa(CPU, "flash") == ("cpu", "sdpa", "fp32")


@pytest.mark.stand_in("the comparison itself replaced, flash-attn said to be installed", card="flash-attn's kernels")
def test_flash_attention_is_compared_on_a_gpu_alone(monkeypatch: Patch) -> None:
    from transformers import utils

    monkeypatch.setattr(checks, "compare_with_eager", lambda device, kind, precision: (kind, precision))
    with pytest.raises(NotHere, match="not installed"):
        checks.check_flash_attention_2(CUDA)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    assert checks.check_flash_attention_2(CUDA) == ("flash_attention_2", "bf16")
    with pytest.raises(NotHere, match="needs an NVIDIA or AMD GPU"):
        checks.check_flash_attention_2(CPU)


@pytest.mark.stand_in("the CPU", card="the error of its kernels")
def test_attention_in_16_bits_is_computed_in_16_bits() -> None:
    passed, text = checks.compare_with_eager(CPU, "sdpa", "bf16")
    assert passed
    assert float(text.split("off by ")[1].split(",")[0]) > 1e-5, "computed in fp32"


@pytest.mark.stand_in("one process, torch.distributed replaced", card="NCCL")
@pytest.mark.parametrize(("device", "backend", "card"), [("cuda", "nccl", 1), ("cpu", "gloo", 0)])
def test_each_process_talks_by_its_devices_library_on_its_own_card(
    device: str, backend: str, card: int, two_h100s: Cards, monkeypatch: Patch
) -> None:
    asked, full = list[Any](), torch.full
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda kind, timeout: asked.append((kind, two_h100s.current)))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda numbers: numbers.mul_(3))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch, "full", lambda *given, device: asked.append(device) or full(*given))
    assert checks.sum_over_processes(device) == (3000.0, 3000.0)
    assert asked == [(backend, card), device]


@pytest.mark.stand_in("the processes' answer given by hand", card="NCCL")
def test_two_cards_are_asked_to_add_up_one_is_not(monkeypatch: Patch) -> None:
    asked = list[Any]()

    class Answers:
        returncode = 0

        def __init__(self, words: list[str], **given: Any) -> None:
            asked.append(words)

        def communicate(self, timeout: float) -> tuple[str, str]:
            return "greetings\n[3, 3]\n", ""

    monkeypatch.setattr(checks.subprocess, "Popen", Answers)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checks.check_all_reduce(CUDA)[0]
    assert asked[0][-1] == "cuda"
    assert checks.check_all_reduce(CPU)[0], "a CPU takes two processes"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(NotHere, match="two GPUs"):
        checks.check_all_reduce(CUDA)


@pytest.mark.stand_in("the CPU", card="the error of its kernels")
def test_product_in_fp16_is_less_exact_than_in_fp32_and_within_its_bound() -> None:
    passed, text = checks.check_matrix_product(CPU, "fp16")
    assert passed
    assert float(text.split()[2].rstrip(",")) > checks.PRODUCT_BOUNDS["fp32"]


@pytest.mark.stand_in("no card", card="that NCCL listens there alone")
def test_processes_of_one_machine_are_given_its_loopback() -> None:
    variables = spawn.loopback_variables()
    name = variables["GLOO_SOCKET_IFNAME"]
    assert "127.0.0.1" in {one.address for one in psutil.net_if_addrs()[name]}
    assert variables["NCCL_SOCKET_IFNAME"] == f"={name}", "this one, not each whose name begins so"
