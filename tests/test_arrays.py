"""store.arrays: zarr-python reads what was written, ranges are those of numpy, and no damage passes for a value."""

import tempfile
import threading
import warnings
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.codecs.numcodecs import Delta

from cohortvi.store import array_writer, native
from cohortvi.store.array_writer import ArrayWriter
from cohortvi.store.arrays import ArrayReader, do_jobs
from cohortvi.store.codec import Codec
from cohortvi.store.libraries import Context

CODECS = [Codec(), Codec(delta=True)]


@contextmanager
def patched(**values):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(array_writer, name, value)
        yield


@pytest.fixture(params=[True, False], ids=["compiled", "through Python"])
def compiled(request, monkeypatch):
    """Decode chunks in compiled code, and one by one."""
    if not request.param:
        monkeypatch.setattr(native, "AVAILABLE", False)
    return request.param


def test_the_compiled_way_is_there():
    assert native.AVAILABLE


def write(folder: Path, values: np.ndarray, codec: Codec, pieces: int = 1, **options) -> zarr.Array:
    """Write values in pieces by our writer; return the array as zarr-python opens it."""
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    with warnings.catch_warnings(), ArrayWriter(group, folder, "x", values.dtype.name, codec, **options) as writer:
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr")
        for part in np.array_split(values, pieces):
            writer.append(part)
        writer.close()
        return zarr.open_group(folder, mode="r")["x"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(["uint8", "uint16", "uint32", "int64"]),
    size=st.integers(0, 900),
    codec=st.sampled_from(CODECS),
    chunk=st.integers(1, 20) | st.integers(100, 300),
    file_chunks=st.integers(1, 4),
    largest=st.sampled_from([5, 300, None]),  # few values are compressed, those of all sizes lie as they are
    data=st.data(),
)
def test_ranges_of_what_was_written_are_those_of_numpy_and_zarr(
    compiled, dtype, size, codec, chunk, file_chunks, largest, data
):
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    bounds = (np.iinfo(dtype).min, np.iinfo(dtype).max) if largest is None else (0, min(largest, np.iinfo(dtype).max))
    values = rng.integers(*bounds, size, dtype, endpoint=True)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    with tempfile.TemporaryDirectory() as folder, patched(FILE_CHUNKS=file_chunks):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "AVAILABLE", data.draw(st.booleans()) or compiled)
            array = write(Path(folder), values, codec._replace(chunk=chunk), data.draw(st.integers(1, 5)))
        np.testing.assert_array_equal(array[:], values)
        reader = ArrayReader(array)
        assert (reader.size, reader.dtype, reader.checked) == (size, np.dtype(dtype), True)
        np.testing.assert_array_equal(reader.read(start, stop), values[start:stop])
        out = np.full(stop - start, 7, dtype)
        assert reader.read(start, stop, out) is out
        np.testing.assert_array_equal(out, values[start:stop])


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 900),
    codec=st.sampled_from(CODECS),
    file_chunks=st.integers(1, 4),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_jobs_read_all_ranges_that_lie_in_one_file(size, codec, file_chunks, threads, data):
    values = np.random.default_rng(data.draw(st.integers(0, 9))).integers(0, 300, (2, size))
    starts = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=9)))
    stops = starts + [data.draw(st.integers(0, size - start)) for start in starts.tolist()]
    places = np.cumsum([0, *(stops - starts)])
    with tempfile.TemporaryDirectory() as folder, patched(FILE_CHUNKS=file_chunks):
        arrays = [
            write(Path(folder) / name, part.astype(name), codec._replace(chunk=data.draw(st.integers(1, 300))))
            for name, part in zip(("uint16", "uint32"), values, strict=True)
        ]
        readers = [ArrayReader(array) for array in arrays]
        assert all(reader.is_native for reader in readers)
        jobs = [reader.jobs(starts, stops, places[:-1]) for reader in readers]
        for number, (part, reader) in enumerate(zip(jobs, readers, strict=True)):
            part["array"], part["block"] = number, np.arange(len(starts))
            first, last = starts // reader.layout.shard, np.maximum(stops - 1, starts) // reader.layout.shard
            assert ((part["size"] == -1) == (first != last)).all()
        todo = np.concatenate([part[part["size"] >= 0] for part in jobs])
        claimed, out = np.zeros(1, np.int64), [np.full(places[-1], 7, reader.dtype) for reader in readers]
        workers = [threading.Thread(target=do_jobs, args=(todo, claimed, *out)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert (todo["failure"] == native.OK).all()
    for job in todo:
        block, number = job["block"], job["array"]
        found = out[number][places[block] : places[block + 1]]
        np.testing.assert_array_equal(found, values[number, starts[block] : stops[block]])


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (7,), "shards": (21,)},
        {"chunks": (7,), "shards": (21,), "compressors": [ZstdCodec(level=3)]},
        {"chunks": (7,), "shards": (21,), "compressors": [BloscCodec(cname="lz4", shuffle="shuffle")]},
        {"chunks": (7,), "shards": (21,), "compressors": None},
        {"chunks": (7,), "shards": (21,), "filters": [Delta(dtype="<u2")], "compressors": [BloscCodec(cname="zstd")]},
        {"chunks": (7,), "shards": (105,), "compressors": [BloscCodec(cname="blosclz", shuffle="bitshuffle")]},
        {"chunks": (7,)},
        {"chunks": (7,), "fill_value": 3},
        {"chunks": (7,), "shards": (21,), "fill_value": 3},
    ],
)
def test_arrays_that_zarr_wrote_in_other_layouts_are_read_the_same(tmp_path, options, compiled):
    values = np.arange(100, dtype=np.uint16) ** 2
    values[14:28] = options.get("fill_value", 0)  # two chunks that are not stored
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr")
        array = zarr.create_array(tmp_path / "x.zarr", shape=(100,), dtype="uint16", **options)
        array[:] = values
    reader = ArrayReader(array)
    assert not reader.checked
    for start, stop in [(0, 100), (0, 0), (3, 5), (13, 29), (20, 22), (99, 100), (40, 90)]:
        np.testing.assert_array_equal(reader.read(start, stop), values[start:stop])
    array[:] = 0  # now no file is there
    np.testing.assert_array_equal(ArrayReader(array).read(5, 95), 0)


def test_unsigned_values_lie_in_the_smallest_type_that_holds_them(tmp_path, monkeypatch):
    monkeypatch.setattr(array_writer, "FILE_CHUNKS", 2)
    values = np.ones(100, np.uint32)
    values[60], values[90] = 300, 70_000
    for end, dtype in ((60, "uint8"), (61, "uint16"), (90, "uint16"), (91, "uint32"), (100, "uint32")):
        folder = tmp_path / str(end)
        group = zarr.open_group(folder, mode="w", zarr_format=3)
        with ArrayWriter(group, folder, "x", "uint8", Codec(chunk=8), grows=True) as writer:
            writer.append(values[:end])
            writer.close()
        assert group["x"].dtype == dtype
        np.testing.assert_array_equal(group["x"][:], values[:end])
        assert sorted(path.name for path in folder.iterdir()) == ["x", "zarr.json"]


def test_no_flipped_byte_passes_for_a_value(tmp_path, compiled):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 50, 2000).astype(np.uint16)
    array = write(tmp_path, values, CODECS[0]._replace(chunk=256))
    path = tmp_path / "x/c/0"
    whole = path.read_bytes()
    for at in [*range(0, len(whole), 37), *range(len(whole) - 140, len(whole))]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(0, 8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x/c/0: .*crc32c"):
            ArrayReader(array).read(0, 2000)
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x/c/0: "):
            ArrayReader(array).read(0, 2000)


def test_damage_without_a_checksum_ends_in_an_error_or_in_values_of_the_right_number(tmp_path):
    values = np.random.default_rng(0).integers(0, 50, 200).astype(np.uint16)
    compressors = [BloscCodec(cname="lz4", shuffle="shuffle")]
    array = zarr.create_array(
        tmp_path / "x.zarr", shape=(200,), dtype="u2", chunks=(50,), shards=(200,), compressors=compressors
    )
    array[:] = values
    path = tmp_path / "x.zarr/c/0"
    whole = path.read_bytes()
    for at in range(4, 16):  # sizes in the header of the first chunk
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        if 8 <= at < 12:  # the size of blocks is the codec's own affair
            with suppress(ValueError):
                assert len(ArrayReader(array).read(0, 200)) == 200
        else:
            with pytest.raises(ValueError, match="chunk 0 cannot be decoded to 50 values"):
                ArrayReader(array).read(0, 200)


def test_what_a_thread_decodes_with_is_freed_with_it():
    context, held = Context(), []
    thread = threading.Thread(target=lambda: held.append((context.address, weakref.ref(context.owned))))
    thread.start()
    thread.join()
    ((address, owned),) = held
    assert address
    assert owned() is None


def test_an_array_in_an_object_store_is_read_by_ranges(tmp_path):
    values = np.arange(1000, dtype=np.uint16)
    write(tmp_path, values, CODECS[0]._replace(chunk=64))
    store = zarr.storage.MemoryStore()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            data = zarr.core.buffer.cpu.Buffer.from_bytes(path.read_bytes())
            zarr.core.sync.sync(store.set(str(path.relative_to(tmp_path)), data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr")
        reader = ArrayReader(zarr.open_group(store, mode="r")["x"])
    assert reader.folder is None
    for start, stop in [(0, 1000), (63, 65), (500, 501)]:
        np.testing.assert_array_equal(reader.read(start, stop), values[start:stop])
