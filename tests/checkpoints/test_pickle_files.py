"""Files of torch.save: the right values, and only CheckpointError, little time and little memory
for anything else.
"""

import io
import json
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from mistral.checkpoints.pickle_files import pickled_tensors
from mistral.errors import CheckpointError

CPU = torch.device("cpu")


def save(value, path, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_views_and_shared_storages_have_their_values(legacy, tmp_path):
    base = torch.randn(40, 60)
    state = OrderedDict(
        whole=base,
        transposed=base.t(),
        piece=base[7:30:2, 3:50:5],
        parameter=torch.nn.Parameter(base[3:]),
        double=base.double()[1:, 1:],
        half=base.half(),
        brain=base.bfloat16().t(),
        scalar=base[0, 1],
        whole_again=base,
    )
    state._metadata = OrderedDict({"": {"version": 1}})  # as Module.state_dict() adds it
    tensors = pickled_tensors(save(state, tmp_path / "m.bin", legacy))
    assert list(tensors) == list(state)
    for name, expected in state.items():
        assert tensors[name].dtype == expected.dtype
        assert tensors[name].num_bytes == expected.nbytes
        read = tensors[name].read(CPU, torch.float64)
        assert torch.equal(read, expected.double())
        assert read.is_contiguous()
    rows = tensors["whole"].read(CPU, torch.float32, heads=4)
    assert torch.equal(rows[:10].view(2, 5, 60).transpose(0, 1).reshape(10, 60), base[:10])


def test_a_tensor_is_read_without_the_rest_of_its_storage(tmp_path):
    large = torch.zeros(1 << 20)
    tensors = pickled_tensors(save({"x": large[5:9]}, tmp_path / "m.bin"))
    assert tensors["x"].mapped().untyped_storage().nbytes() == 16


class Subclass(torch.Tensor):
    pass


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


REFUSED = {
    "a sparse tensor": (torch.eye(2).to_sparse(), "x is a sparse tensor"),
    "a meta tensor": (torch.zeros(2, device="meta"), "x is a tensor without values"),
    "float8": (torch.zeros(2).to(torch.float8_e4m3fn), "x is a tensor of a rare dtype"),
    "a subclass": (torch.zeros(2).as_subclass(Subclass), "x is a tensor subclass"),
    "an expanded tensor": (torch.zeros(1).expand(9), "x is an expanded view"),
    "a dictionary": ({"y": torch.zeros(1)}, "x is of type dict, not a tensor"),
    "a number": (3, "x is of type int, not a tensor"),
    "a module": (torch.nn.Linear(2, 2), "x is more than a plain tensor .torch.nn"),
    "code": (Evil(), "x is more than a plain tensor .__builtin__.print"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_other_values_are_refused_by_name(what, legacy, tmp_path, capsys):
    value, message = REFUSED[what]
    if what == "a module" and legacy:
        message = "torch.nn"  # the old format names the class first
    with pytest.raises(CheckpointError, match=message):
        pickled_tensors(save({"x": value}, tmp_path / "m.bin", legacy))
    assert "must not run" not in capsys.readouterr().out


# Programs for a pickle machine


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    return b"J" + struct.pack("<i", value)


def named(name):
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode()


def storage(key="0", size=4, kind="torch.FloatStorage"):
    return b"(" + text("storage") + named(kind) + text(key) + text("cpu") + number(size) + b"tQ"


def tensor(stored=None, offset=0, shape=(4,), strides=(1,), end=b"\x89}t"):
    numbers = [b"(" + b"".join(map(number, sizes)) + b"t" for sizes in (shape, strides)]
    arguments = b"(" + (stored or storage()) + number(offset) + b"".join(numbers)
    return named("torch._utils._rebuild_tensor_v2") + arguments + end + b"R"


def entry(value):
    return b"}" + text("x") + value + b"s"


def archive(program, *more, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as entries:
        entries.writestr("m/data.pkl", b"\x80\x02" + program + b".")
        entries.writestr("m/data/0", bytes(16))
        for name, data in more:
            entries.writestr(name, data)
    return file.getvalue()


def cut_in(data, at, value):
    """An archive whose end record has another number, counted from its end."""
    return data[:at] + struct.pack("<I", value) + data[at + 4 or None :]


def forged(data, name, **fields):
    """An archive whose directory says something else about an entry: its method or its sizes."""
    data = bytearray(data)
    listed = data.rindex(name.encode()) - 46
    if "method" in fields:
        struct.pack_into("<H", data, listed + 10, fields["method"])
    if "size" in fields:
        struct.pack_into("<II", data, listed + 20, fields["size"], fields["size"])
    return bytes(data)


def sharing():
    """An archive whose directory has two storages in the same bytes."""
    program = entry(tensor()) + text("y") + tensor(storage("1")) + b"s"
    data = bytearray(archive(program, ("m/data/1", bytes(16))))
    listed = data.rindex(b"m/data/1") - 46
    struct.pack_into("<I", data, listed + 42, data.index(b"m/data/0") - 30)
    return bytes(data)


def tar_archive():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as entries:
        entries.addfile(tarfile.TarInfo("storages"))
    return file.getvalue()


DICT = named("collections.OrderedDict") + b")R"
PLAIN = archive(entry(tensor()))
MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
LAUGHS = b")" + b"".join(b"q%ch%ch%c\x87" % (i, i, i) for i in range(200))
HOSTILE = {
    "an empty file": b"",
    "nonsense": b"nonsense" * 100,
    "a pickle alone": pickle.dumps({"x": 1}),
    "a bytearray by its class": archive(named("builtins.bytearray") + number(2**31 - 1) + b"\x85R"),
    "a bytearray by its instruction": archive(b"\x96" + struct.pack("<Q", 2**40)),
    "a huge integer": archive(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "a long integer in digits": archive(b"L" + b"9" * 4_000_000 + b"L\n"),
    "a compressed pickle": archive(b"}" * 20_000_000, compression=zipfile.ZIP_DEFLATED),
    "a memory cell far away": archive(b"}r" + b"\xff" * 4 + text("y") + b"s"),
    "a million dictionaries": archive(b"}" * 4_000_000),
    "as many dictionaries as may be": archive(b"}" * 190_000 + b"("),
    "a nested tuple": archive(entry(b")" + b"\x85" * 190_000)),
    "a nested tuple as a key": archive(b"})" + b"\x85" * 190_000 + b"Ns"),
    "a tuple of exponential size": archive(entry(LAUGHS)),
    "a tuple of exponential size as a key": archive(b"}" + LAUGHS + b"Ns"),
    "a dictionary without its methods": archive(
        DICT + b"}(" + text("values") + b"N" + text("items") + b"Nub" + text("x") + b"Ns"
    ),
    "attributes of a tensor": archive(entry(tensor() + b"}" + text("shape") + b"Nsb")),
    "a shell": archive(named("os.system") + text("true") + b"\x85R"),
    "a zero stride": archive(entry(tensor(shape=(2**30,), strides=(0,)))),
    "axes that overlap": archive(
        entry(tensor(storage("1", 100), shape=(2, 2, 2), strides=(50, 1, 1))),
        ("m/data/1", bytes(400)),
    ),
    "a shape of many axes": archive(entry(tensor(shape=(1,) * 9999, strides=(1,) * 9999))),
    "more strides than axes": archive(entry(tensor(shape=(4,), strides=(1, 1)))),
    "a tensor that ends outside": archive(entry(tensor(offset=1))),
    "a tensor that begins outside": archive(entry(tensor(offset=-1))),
    "a storage larger than its entry": archive(entry(tensor(storage(size=2**31 - 1)))),
    "a storage without an entry": archive(entry(tensor(storage("7")))),
    "a storage of no type": archive(entry(tensor(storage(kind="collections.OrderedDict")))),
    "a storage of two types": archive(
        entry(tensor()) + text("y") + tensor(storage(kind="torch.HalfStorage")) + b"s"
    ),
    "a tensor of nothing": archive(named("torch._utils._rebuild_tensor_v2") + b")R"),
    "a negated tensor": archive(entry(tensor(end=b"\x89}}" + text("neg") + b"\x88st"))),
    "a thousand names for one tensor": archive(
        entry(tensor(storage("1", 1000), shape=(1000,)) + b"q\0")
        + b"".join(text(f"{i}") + b"h\0s" for i in range(1000)),
        ("m/data/1", bytes(4000)),
    ),
    "a key that is not a text": archive(b"}" + number(3) + tensor() + b"s"),
    "a name with half a character": archive(b"}X\3\0\0\0\xed\xa0\x80Ns"),
    "a name of 4 MB": archive(entry(b"N").replace(text("x"), text("x" * 4_000_000))),
    "a storage that is not from torch.save": archive(b"Pstorage\n"),
    "an empty stack": archive(b""),
    "attributes of nothing": archive(b"}b"),
    "a mark that is not there": archive(b"t"),
    "no end": archive(b"").replace(b"\x80\x02.", b"\x80\x02N"),
    "a list": archive(b"]"),
    "a newer protocol": archive(pickle.dumps({"x": 1}, 5)[:-1]),
    "other byte order": archive(entry(tensor()), ("m/byteorder", b"big")),
    "two pickles": archive(b"}", ("n/data.pkl", b"}.")),
    "two storages of one name": archive(b"}", ("m/data/1", b""), ("m/data/2", b"")).replace(
        b"m/data/2", b"m/data/1"
    ),
    "storages in the same bytes": sharing(),
    "a storage that is compressed to its own size": forged(PLAIN, "m/data/0", method=8),
    "an entry that ends outside the file": forged(
        archive(entry(tensor(storage(size=100), shape=(100,)))), "m/data/0", size=400
    ),
    "many storages": archive(storage()[:-1] + b"q\0" + b"h\0Q" * 95_000),
    "many tensors": archive(
        named("torch._utils._rebuild_tensor_v2")
        + b"q\0"
        + tensor().removeprefix(named("torch._utils._rebuild_tensor_v2"))[:-1]
        + b"q\1"
        + b"h\0h\1R" * 60_000
    ),
    "an archive of TAR": tar_archive(),
    "an entry outside its folder": archive(
        entry(tensor(storage("../x"))), ("m/data/../x", bytes(16)), ("m/x", b"")
    ).replace(b"m/data/../x", b"m/data/..\0x"),
    "many entries": archive(b"}", *((f"m/{i}", b"") for i in range(100_000))),
    "a directory larger than the file": cut_in(PLAIN, -10, 2**31),
    "a directory for large archives that is not there": cut_in(PLAIN, -10, 2**32 - 1),
    "a directory outside the file": cut_in(PLAIN, -6, 2**31),
    "half a file": PLAIN[: len(PLAIN) // 2],
    "the old format, of dictionaries": MAGIC + b"\x80\x02M\xe9\x03.\x80\x02" + b"}" * 4_000_000,
    "the old format, cut": MAGIC,
    "the old format without storages": MAGIC
    + b"\x80\x02M\xe9\x03.\x80\x02}"
    + text("little_endian")
    + b"\x88s.\x80\x02"
    + entry(tensor())
    + b".\x80\x02]"
    + text("0")
    + b"a.",
}

READ_ALL = """
import json, sys, time
from pathlib import Path
from mistral.checkpoints.pickle_files import pickled_tensors
from mistral.errors import CheckpointError
def megabytes():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) >> 10
for path in sorted(Path(sys.argv[1]).iterdir()):
    before, start, message = megabytes(), time.process_time(), None
    try:
        pickled_tensors(path)
    except CheckpointError as error:
        message = str(error)
    took = time.process_time() - start
    print(json.dumps([path.name, message, megabytes() - before, took]), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_hostile_files_are_refused_in_one_line_with_little_memory(tmp_path):
    for name, data in HOSTILE.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", READ_ALL, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == len(HOSTILE)
    for name, message, megabytes, seconds in rows:
        assert message is not None, name
        message.encode()  # can be printed
        assert message.startswith(str(tmp_path / name))
        assert message.isprintable()
        assert len(message) < 600
        assert megabytes < 150, name
        assert seconds < 20, name


def test_a_forged_file_without_a_fault_is_read(tmp_path):
    # The forgeries above differ from this one in their fault alone.
    (tmp_path / "m.bin").write_bytes(PLAIN)
    tensors = pickled_tensors(tmp_path / "m.bin")
    assert torch.equal(tensors["x"].read(CPU, torch.float32), torch.zeros(4))


@pytest.mark.parametrize("legacy", [False, True])
def test_mutated_files_give_tensors_or_a_checkpoint_error(legacy, tmp_path):
    path = tmp_path / "m.bin"
    original = save({f"x.{i}": torch.randn(3, 4) for i in range(4)}, path, legacy).read_bytes()
    generator = random.Random(legacy)
    for _ in range(500):
        data = bytearray(original)
        at = generator.randrange(len(data))
        match generator.randrange(4):
            case 0:
                del data[at:]
            case 1:
                for _ in range(generator.choice([1, 5, 20])):
                    data[generator.randrange(len(data))] = generator.randrange(256)
            case 2:
                del data[at : at + generator.randrange(40)]
            case 3:
                data[at:at] = generator.randbytes(5)
        path.write_bytes(data)
        try:
            for tensor in pickled_tensors(path).values():
                tensor.read(CPU, torch.float32)
        except CheckpointError:
            pass
