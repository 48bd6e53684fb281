"""ema_update_ against fp64, on every mixture of dtypes and layouts, and on everything a caller may get wrong."""

import copy

import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

from fastdino_kernels import ema_update_, reference, tensor_table
from fastdino_kernels.ema import _ema_update_
from fastdino_kernels.launch import LAUNCH
from fastdino_kernels.tensor_table import _TABLES, KEPT_ROWS, KEPT_TABLES, table_for

BLOCK = LAUNCH["ema"].block
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (fp32, bf16, fp16)]


def model(dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    """Whole blocks, a tail, less than a block, one number, nothing, an unaligned view, and two with strides."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    return [
        normal(2, BLOCK),
        normal(BLOCK + 257),
        normal(3, 5),
        normal(),
        normal(0),
        normal(BLOCK + 8)[1:],
        normal(16, 24).t(),
        normal(24, 40)[::2, ::3],
        normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ]


def check(teacher: list[Tensor], student: list[Tensor], momentum: float | Tensor, copies: list[Tensor] | None) -> None:
    """One update, compared tensor by tensor with fp64 within what the dtypes allow."""
    truth = [x.double() for x in teacher]
    plain = [x.clone() for x in teacher]
    reference.ema_update_(truth, [x.double() for x in student], float(momentum))
    reference.ema_update_(plain, student, float(momentum))
    ema_update_(teacher, student, momentum, copies=copies)
    for i, (ours, same, exact) in enumerate(zip(teacher, plain, truth)):
        assert_within_budget(f"teacher[{i}]", ours, same, exact, ours.dtype)
    for i, (ours, same, exact) in enumerate(zip(copies or [], plain, truth)):
        assert_within_budget(f"copies[{i}]", ours, same.to(ours.dtype), exact, ours.dtype)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_ema_matches_fp64(teacher_dtype: torch.dtype, student_dtype: torch.dtype, device: torch.device) -> None:
    teacher, student = model(teacher_dtype, device, 0), model(student_dtype, device, 1)
    check(teacher, student, torch.tensor(0.75, device=device), copies=None)


def test_ema_writes_low_precision_copies_and_mixes_dtypes_within_a_list(device: torch.device) -> None:
    dtypes = (fp32, bf16, fp16)
    teacher = [x.to(dtypes[i % 3]) for i, x in enumerate(model(fp32, device, 0))]
    student = [x.to(dtypes[i // 3 % 3]) for i, x in enumerate(model(fp32, device, 1))]
    copies = [torch.full_like(x, torch.nan, dtype=(bf16, fp16)[i % 2]) for i, x in enumerate(teacher)]
    check(teacher, student, 0.996, copies)


def test_ema_of_operands_in_different_memory_order(device: torch.device) -> None:
    teacher = [torch.randn(48, 64, device=device), torch.randn(64, 48, device=device).t()]
    student = [torch.randn(64, 48, device=device).t(), torch.randn(48, 64, device=device)]
    copies = [torch.full((48, 128), torch.nan, device=device)[:, ::2] for _ in range(2)]
    check(teacher, student, 0.5, copies)


def test_ema_leaves_what_lies_around_a_view(device: torch.device) -> None:
    storage = torch.full((BLOCK + 64,), torch.inf, device=device)
    teacher = storage[3:-5]
    teacher.zero_()
    ema_update_([teacher], [torch.ones_like(teacher)], 0.25)
    assert torch.equal(teacher, torch.full_like(teacher, 0.75))
    assert storage[:3].isinf().all()
    assert storage[-5:].isinf().all()


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_ema_at_the_ends_of_momentum(momentum: float, device: torch.device) -> None:
    teacher, student = torch.randn(300, device=device), torch.randn(300, device=device)
    expected = (teacher if momentum == 1 else student).clone()
    ema_update_([teacher], [student], momentum)
    assert torch.equal(teacher, expected)


def test_ema_passes_over_tensors_without_elements(device: torch.device) -> None:
    ema_update_([], [], 0.5)
    for shapes in ([(0, 3)], [(0, 3), (5,), (0,)], [(5,), (0, 3), (7,)]):
        teacher = [torch.zeros(shape, device=device) for shape in shapes]
        ema_update_(teacher, [torch.ones_like(x) for x in teacher], 0.25)
        assert [x.tolist() for x in teacher] == [torch.full(shape, 0.75).tolist() for shape in shapes]


def test_ema_of_parameters_and_of_fp64(device: torch.device) -> None:
    student = torch.nn.Linear(7, 5, device=device)
    teacher = copy.deepcopy(student).double()
    before = [x.detach().clone() for x in teacher.parameters()]
    with torch.no_grad():
        student.weight.add_(1)
    ema_update_(list(teacher.parameters()), list(student.parameters()), 0.9)
    torch.testing.assert_close(teacher.weight - before[0], torch.full_like(teacher.weight, 0.1), rtol=0, atol=1e-6)
    torch.testing.assert_close(teacher.bias, before[1], rtol=0, atol=1e-12)


def test_ema_reruns_to_the_same_bits(device: torch.device) -> None:
    student = model(bf16, device, 1)
    first, second = model(fp32, device, 0), model(fp32, device, 0)
    for teacher in (first, second):
        for _ in range(2):
            ema_update_(teacher, student, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_ema_passes_opcheck(device: torch.device) -> None:
    teacher, student = [torch.randn(40, 5, device=device)], [torch.randn(40, 5, device=device)]
    momentum = torch.tensor(0.5, device=device)
    torch.library.opcheck(_ema_update_, (teacher, student, momentum, []))
    torch.library.opcheck(_ema_update_, (teacher, student, momentum, [torch.empty_like(teacher[0], dtype=bf16)]))


def test_ema_compiles_fullgraph(device: torch.device) -> None:
    def step(teacher: list[Tensor], student: list[Tensor], momentum: Tensor, copies: list[Tensor]) -> Tensor:
        ema_update_(teacher, student, momentum, copies=copies)
        return teacher[0].sum() + copies[0].float().sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        teacher, student = model(fp32, device, 0)[:3], model(fp32, device, 1)[:3]
        copies = [torch.empty_like(x, dtype=bf16) for x in teacher]
        total = run(teacher, student, torch.tensor(0.9, device=device), copies)
        results.append([total, *teacher, *copies])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_ema_does_not_wait_for_the_device(fakegpu: torch.device) -> None:
    teacher = [torch.empty(5, 7, device=fakegpu), torch.empty(3, device=fakegpu)]
    student = [torch.empty(5, 7, device=fakegpu, dtype=bf16), torch.empty(3, device=fakegpu)]
    ema_update_(teacher, student, torch.empty((), device=fakegpu))
    ema_update_(teacher, student, 0.9, copies=[torch.empty_like(x) for x in teacher])


def wrong(change: str) -> dict:
    """Good arguments with one of them spoilt."""
    kwargs = {"teacher": [torch.zeros(2, 3), torch.zeros(4)], "student": [torch.ones(2, 3), torch.ones(4)]}
    kwargs |= {"momentum": 0.5, "copies": None}
    spoilt = {
        "length": {"student": kwargs["student"][:1]},
        "shape": {"student": [torch.ones(3, 2), torch.ones(4)]},
        "integers": {"student": [torch.ones(2, 3), torch.ones(4, dtype=torch.int64)]},
        "copies": {"copies": [torch.ones(2, 3)]},
        "device": {"student": [torch.ones(2, 3), torch.ones(4, device="meta")]},
        "devices": {"teacher": [torch.zeros(2, 3), torch.zeros(4, device="meta")]},
        "momentum above 1": {"momentum": 1.5},
        "momentum below 0": {"momentum": -0.1},
        "momentum nan": {"momentum": float("nan")},
        "momentum vector": {"momentum": torch.zeros(2)},
        "momentum elsewhere": {"momentum": torch.zeros((), device="meta")},
    }[change]
    if change == "devices":
        spoilt["student"] = [torch.ones(2, 3), torch.ones(4, device="meta")]
    return kwargs | spoilt


@pytest.mark.parametrize(
    ("change", "expected", "got"),
    [
        ("length", "2 tensors", "got 1"),
        ("shape", "(2, 3)", "(3, 2)"),
        ("integers", "floating", "int64"),
        ("copies", "2 tensors", "got 1"),
        ("device", "cpu", "meta"),
        ("devices", "cpu", "meta"),
        ("momentum above 1", "[0, 1]", "1.5"),
        ("momentum below 0", "[0, 1]", "-0.1"),
        ("momentum nan", "[0, 1]", "nan"),
        ("momentum vector", "0-D", "(2,)"),
        ("momentum elsewhere", "cpu", "meta"),
    ],
)
def test_ema_refuses_what_does_not_fit(change: str, expected: str, got: str) -> None:
    kwargs = wrong(change)
    with pytest.raises(ValueError, match="expected") as error:
        ema_update_(**kwargs)
    assert expected in str(error.value)
    assert got in str(error.value)
    assert not kwargs["teacher"][0].any()


def test_the_table_of_a_model_is_built_once_and_not_kept_for_ever(device: torch.device) -> None:
    teacher, student = [torch.zeros(40, device=device)], [torch.ones(40, device=device)]
    ema_update_(teacher, student, 0.5)
    table = table_for(teacher, (BLOCK,))
    (rows,) = table._rows.values()
    ema_update_(teacher, student, 0.5)
    assert table_for(teacher, (BLOCK,)) is table
    assert next(iter(table._rows.values())) is rows

    others = [torch.ones(40, device=device) for _ in range(2 * KEPT_ROWS)]
    for other in others:  # as gradients move
        ema_update_(teacher, [other], 0.5)
    assert len(table._rows) <= KEPT_ROWS
    models = [[torch.zeros(3, device=device)] for _ in range(2 * KEPT_TABLES)]
    for x in models:
        ema_update_(x, [torch.ones(3, device=device)], 0.5)
    assert len(_TABLES) <= KEPT_TABLES
    del models, x
    last = [torch.zeros(5, device=device)]
    ema_update_(last, [torch.ones(5, device=device)], 0.5)  # a new table sweeps out those of models that are gone
    assert all(table.in_use() for table in _TABLES.values())


def test_what_a_capture_has_used_is_held(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Capturing is pretended: what is looked at is which tables are made, found and held."""
    teacher, first, second = (
        [torch.zeros(8, device=device)],
        [torch.ones(8, device=device)],
        [torch.ones(8, device=device)],
    )
    monkeypatch.setattr(tensor_table, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="expected a run of this op before its capture"):
        ema_update_(teacher, first, 0.5)
    monkeypatch.undo()
    ema_update_(teacher, first, 0.5)
    table = table_for(teacher, (BLOCK,))
    table._spares = [torch.empty(1, 9, dtype=torch.int64)]
    monkeypatch.setattr(tensor_table, "_capturing", lambda device: True)
    ema_update_(teacher, first, 0.5)
    assert table.captured == list(table._rows.values())  # found, and held from now on
    ema_update_(teacher, second, 0.5)  # gradients of the capture's own
    assert len(table.captured) == 3
    assert len(table._rows) == 1  # an eager call must not find what only a replay fills
    with pytest.raises(RuntimeError, match="expected a run of this op outside of a capture"):
        ema_update_(teacher, [torch.ones(8, device=device)], 0.5)
    assert torch.equal(teacher[0], torch.full((8,), 0.875, device=device))


def test_a_tensor_listed_twice_is_refused(device: torch.device) -> None:
    teacher, student = torch.zeros(6, device=device), torch.ones(6, device=device)
    with pytest.raises(ValueError, match="expected each in memory of its own, got two at one address"):
        ema_update_([teacher, teacher], [student, student], 0.5)
    assert not teacher.any()


def test_a_model_rebuilt_at_old_addresses_is_not_served_an_old_table(device: torch.device) -> None:
    storage = torch.zeros(BLOCK, device=device)
    source = torch.ones(BLOCK, device=device)
    ema_update_([storage], [source], 0.5)
    ema_update_([storage[:10]], [source[:10]], 0.5)  # same address, other size
    ema_update_([storage.view(bf16)[:4]], [source.to(bf16)[:4]], 0.0)  # same address, other dtype
    assert torch.equal(storage.view(bf16)[:4], torch.ones(4, dtype=bf16, device=device))
    assert torch.equal(storage[10:], torch.full((BLOCK - 10,), 0.5, device=device))
    assert torch.equal(storage[2:10], torch.full((8,), 0.75, device=device))


@pytest.mark.gpu
def test_ema_of_a_whole_model_on_the_gpu() -> None:
    device = torch.device("cuda")
    shapes = [(65536, 256), *[(1536, 384), (384, 1536), (1152, 384), (384, 384), (384,), (1536,)] * 12, (1, 197, 384)]
    teacher = [torch.randn(shape, device=device) for shape in shapes]
    student = [torch.randn(shape, device=device) for shape in shapes]
    check(teacher, student, torch.tensor(0.996, device=device), [torch.empty_like(x, dtype=bf16) for x in teacher])


@pytest.mark.gpu
def test_ema_never_synchronises_the_gpu() -> None:
    teacher, student = model(fp32, torch.device("cuda"), 0), model(bf16, torch.device("cuda"), 1)
    momentum = torch.tensor(0.9, device="cuda")
    ema_update_(teacher, student, momentum)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema_update_(teacher, student, momentum)
        ema_update_(teacher, [x.clone() for x in student], momentum)  # other addresses: a new table
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_ema_replays_with_changing_momentum() -> None:
    device = torch.device("cuda")
    teacher, student = model(fp32, device, 0), model(fp32, device, 1)
    momentum = torch.tensor(0.9, device=device)
    ema_update_(teacher, student, momentum)
    eager = [x.clone() for x in teacher]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(teacher, student, momentum)
    for value in (0.5, 0.996, 1.0):
        momentum.fill_(value)
        graph.replay()
        ema_update_(eager, student, value)
        assert all(torch.equal(a, b) for a, b in zip(teacher, eager))
