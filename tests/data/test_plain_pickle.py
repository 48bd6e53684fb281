"""Pickles of plain data come out whole; nothing that a pickle names is run."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from fastdino.data.plain_pickle import load_plain
from fastdino.errors import UserError

HELD = {
    "imlist": ["a", "b"],
    "gnd": [
        {
            "bbx": np.array([1.5, 2.0], np.float32),
            "easy": np.array([3, 70000]),
            "hard": np.array([], np.int64),
            "junk": [np.int64(4)],
            "big": np.array([1, 258], ">i2"),
            "words": np.array(["ab", "c"]),
            "objects": np.array(["x", None], dtype=object),
        }
    ],
}
PLAIN = {
    "imlist": ["a", "b"],
    "gnd": [
        {
            "bbx": [1.5, 2.0],
            "easy": [3, 70000],
            "hard": [],
            "junk": [4],
            "big": [1, 258],
            "words": ["ab", "c"],
            "objects": ["x", None],
        }
    ],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol_come_out_as_lists(protocol, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(HELD, protocol=protocol))
    assert load_plain(path) == PLAIN


def test_a_pickle_of_python_2_and_an_old_numpy_is_read(tmp_path):
    """As Python 2 writes np.array([1, 258], '<i2'): names of numpy.core, and bytes as text."""
    path = tmp_path / "x.pkl"
    path.write_bytes(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nt"
        b"cnumpy\ndtype\n(S'i2'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x01\\x00\\x02\\x01'\ntb."
    )
    assert load_plain(path) == [1, 258]


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "value",
    [RunsCode(), {"gnd": [RunsCode()]}, OrderedDict(a=1), np.random.RandomState(0), pickle.loads],
    ids=["code", "code inside", "OrderedDict", "RandomState", "function"],
)
def test_what_names_anything_else_is_refused_and_not_run(value, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
    with pytest.raises(UserError, match=r"x\.pkl holds pickled code, which is refused and not run: \w+"):
        load_plain("x.pkl")
    assert not (tmp_path / "hacked").exists()


WHOLE = pickle.dumps(HELD)
DAMAGED = {
    "empty": b"",
    "garbage": b"garbage",
    "cut": WHOLE[:-30],
    "endless": b"\x80\x04]\x94h\x00a.",  # a list that holds itself
    "array of dates": pickle.dumps(np.array(["2020-01-01"], "M8[D]")),
    "array without bytes": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR.",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pickle_is_one_line(name, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(UserError, match=r"x\.pkl is no pickle of plain data, or is damaged: .+") as error:
        load_plain(path)
    assert "\n" not in str(error.value)


def test_bits_that_flip_never_do_worse(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.pkl"
    n_refused = 0
    for _ in range(300):
        data = np.frombuffer(WHOLE, np.uint8).copy()
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data.tobytes())
        try:
            load_plain(path)
        except UserError:
            n_refused += 1
    assert 50 < n_refused < 290


def test_a_missing_pickle_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_plain(tmp_path / "x.pkl")
