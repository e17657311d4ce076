"""The damaged inputs of `tests.reliability.fuzz`: all that is in one follows from its `random.Random`."""

import dataclasses
import functools
import io
import os
import pathlib
import pickle
import pickletools
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable

import numpy as np
from PIL import Image

from maml.datasets import folder, miniimagenet
from maml.datasets.images import decode
from maml.datasets.images import pickles as safe_pickle
from maml.datasets.images.cache import cached
from maml.settings.flags import of_settings
from maml.settings.settings import FLAGS, as_flagfile, parse

Feed = Callable[[], object]
SIDE = 16

# --- Bytes --------------------------------------------------------------------------------------------

EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def _place(chance: random.Random, raw: bytes | bytearray) -> int:
    """A place in it, more often near the front, where the heads are."""
    return int(len(raw) * chance.random() ** chance.choice((1, 3)))


def damaged(chance: random.Random, raw: bytes, most: int = 6) -> bytes:
    """The bytes after a few changes, at times none."""
    raw = bytearray(raw)
    for _ in range(chance.randint(0, most)):
        at, other = _place(chance, raw), _place(chance, raw)
        long = chance.choice((1, 4, 16, 64, 512))
        match chance.randrange(9):
            case 0 if raw:
                raw[min(at, len(raw) - 1)] ^= 1 << chance.randrange(8)
            case 1:
                raw[at : at + 1] = bytes([chance.randrange(256)])
            case 2:
                order = chance.choice("<>")
                raw[at : at + 4] = struct.pack(f"{order}I", chance.choice(EXTREMES))
            case 3:
                raw[at : at + 2] = struct.pack(">H", chance.choice(EXTREMES) & 0xFFFF)
            case 4:
                del raw[at : at + long]
            case 5:
                raw[at:at] = raw[other : other + long]
            case 6:
                raw[at:at] = chance.randbytes(long)
            case 7:
                raw[at : at + long] = bytes(long)
            case 8 if chance.random() < 0.3:
                del raw[at:]
    return bytes(raw)


# --- Flags --------------------------------------------------------------------------------------------

NAMES = sorted(flag.name for flag in of_settings(FLAGS))
VALUES = (
    *("", "0", "1", "2", "5", "-1", "3.5", "1e-3", "nan", "-inf", "1e999", "True", "false", "None", "0x1F"),
    *("sinusoid", "omniglot", "miniimagenet", "folder", "batch_norm", "oracle", "best", "random", "photos"),
    *("9" * 30, "9" * 5000, "a" * 300, "a/" * 2000, "~", "-", "--", "--seed=3", "=", " 5 ", "\t", "\n", "\0"),
    *("²", "٣", "é", "日本", "\udcff", "\u2028", "\x1b[2J", "{}", "%s", "$HOME", "'", '"', "\\", "..", "/"),
)  # fmt: skip
SENSIBLE = [
    ("--datasource=omniglot", "--num_classes=20", "--stop_grad"),
    ("--datasource=folder", "--data_dir=/photos", "--img_size=64", "--skip_bad_images"),
    ("--train=False", "--test_iter=100", "--test_set"),
    ("--train=False", "--train_update_batch_size=1", "--train_update_lr=0.4"),
    ("--baseline=oracle", "--pretrain_iterations=5"),
    ("--datasource=miniimagenet", "--update_batch_size=1", "--num_query=15", "--logdir=/a folder"),
]


def _argument(chance: random.Random) -> str:
    name, value = chance.choice(NAMES), chance.choice(VALUES)
    if chance.random() < 0.3:
        value = str(
            chance.choice((chance.randint(-5, 10**6), chance.uniform(-1, 1), 10 ** chance.randint(0, 40)))
        )
    if chance.random() < 0.1:
        name = (
            "".join(chance.sample(name, len(name))) if chance.random() < 0.5 else name[: chance.randrange(9)]
        )
    form = chance.choice(
        ("--{}={}",) * 8 + ("-{}={}", "--{}", "--no{}", "--no{}={}", "{}={}", "--{} {}", "--{}\n{}")
    )
    return form.format(name, value)


def flags(chance: random.Random, folder: pathlib.Path) -> Feed:
    """Arguments on the command line, or partly in flagfiles that may be damaged or in each other."""
    arguments = list(chance.choice(SENSIBLE)) if chance.random() < 0.5 else []
    arguments += [_argument(chance) for _ in range(chance.randint(0, 4))]
    chance.shuffle(arguments)
    if chance.random() < 0.1:
        arguments.insert(
            chance.randint(0, len(arguments)), chance.choice(("--", "-", "x", "--flagfile", "--undefok=x"))
        )
    if chance.random() < 0.4:
        files = [folder / f"{i}.flags" for i in range(chance.randint(1, 3))]
        for file in files:
            lines = [_argument(chance) for _ in range(chance.randint(0, 3))] + arguments[
                len(arguments) // 2 :
            ]
            lines += [f"--flagfile={other}" for other in files if chance.random() < 0.2]
            text = "\n".join(lines).encode(errors=chance.choice(("surrogateescape", "replace")))
            file.write_bytes(damaged(chance, text) if chance.random() < 0.5 else text)
        arguments = [*arguments[: len(arguments) // 2], f"--flagfile={files[0]}"]
    return functools.partial(_parse, arguments, folder / "again.flags")


def _parse(arguments: list[str], _: pathlib.Path) -> None:
    """Parses them; what comes of it has to come back whole from the flagfile of its run."""
    settings = parse(arguments)
    if settings.train:
        again = parse(as_flagfile(settings).splitlines())
        again = dataclasses.replace(again, checkpoint=settings.checkpoint)
        assert again == settings, (settings, again)
    assert settings.run_dir.name == settings.folder_name


# --- Images -------------------------------------------------------------------------------------------


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    with io.BytesIO() as out:
        image.save(out, kind, **options)
        return out.getvalue()


@functools.cache
def images() -> tuple[bytes, ...]:
    """Small images in every format and mode that can be written here, and real ones if there are any."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), np.uint8)
    rgb = Image.fromarray(noise[..., :3])
    made = [
        *(_encoded(rgb.convert(mode), "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(_encoded(rgb.convert(mode), "jpeg") for mode in ("L", "RGB", "CMYK")),
        *(_encoded(rgb.convert(mode), "tiff") for mode in ("1", "L", "P", "RGB", "RGBA", "F", "LAB")),
        *(
            _encoded(rgb, "tiff", compression=kind)
            for kind in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits")
        ),
        *(_encoded(rgb.convert("P"), kind) for kind in ("gif", "bmp", "pcx", "tga")),
        *(_encoded(rgb, kind) for kind in ("webp", "bmp", "ppm", "ico", "jpeg2000")),
        _encoded(Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "png"),
        _encoded(rgb, "png", exif=_turned()),
        _encoded(rgb, "jpeg", exif=_turned(), progressive=True),
        _encoded(rgb, "gif", save_all=True, append_images=[rgb.rotate(90)]),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n",
    ]
    return (*made, *_real_images())


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _real_images() -> list[bytes]:
    folder = pathlib.Path(os.environ.get("MAML_DATA_DIR") or "/nowhere")
    found = []
    if (tar := folder / "tiny_imagenet_fewshot.tar").is_file():
        with tarfile.open(tar) as archive:
            files = (member for member in archive if member.isfile() and "JPEG" in member.name.upper())
            found += [archive.extractfile(next(files)).read() for _ in range(10)]
    if (path := folder / "omniglot" / "images_background.zip").is_file():
        with zipfile.ZipFile(path) as archive:
            found += [archive.read(name) for name in archive.namelist()[-400::100]]
    return found


def _tree(chance: random.Random) -> dict[str, bytes]:
    """Three classes of two images, of which the second may be damaged."""
    suffix = chance.choice((".png", ".jpg", ".tif", ".gif", ""))
    return {
        f"class{c}/{i}{suffix}": damaged(chance, chance.choice(images())) if i else images()[4]
        for c in range(3)
        for i in range(2)
    }


def _tar(tree: dict[str, bytes], chance: random.Random) -> bytes:
    kinds = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    with io.BytesIO() as out:
        with tarfile.open(fileobj=out, mode="w", format=chance.choice(kinds)) as archive:
            for name, content in tree.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return out.getvalue()[: -chance.choice((1, 512, 8192))] if chance.random() < 0.1 else out.getvalue()


def _zip(tree: dict[str, bytes], chance: random.Random) -> bytes:
    kind = chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w", kind) as archive:
            for name, content in tree.items():
                archive.writestr(zipfile.ZipInfo(name), content, kind)
        return out.getvalue()


def _read_photographs(path: pathlib.Path, decode: Callable, channels: int, skip: bool) -> None:
    decode = functools.partial(decode, side=SIDE)
    for split in cached(
        folder.photographs(path), decode=decode, shape=(SIDE, SIDE, channels), skip_bad_images=skip
    ).values():
        assert split.images.shape[1:] == (SIDE, SIDE, channels)
        assert len(split.classes) + 1 == len(split.offsets) and split.offsets[-1] == len(split.images)


def pictures(chance: random.Random, folder: pathlib.Path) -> Feed:
    """Damaged images in class folders, a tar or a zip."""
    tree = _tree(chance)
    decoders = ((decode.decode_photograph, 3), (miniimagenet.decode, 3), (decode.decode_drawing, 1))
    kind = chance.choice(("", ".tar", ".zip"))
    if kind:
        path = folder / f"photos{kind}"
        path.write_bytes((_tar if kind == ".tar" else _zip)(tree, chance))
    else:
        path = folder
        for name, content in tree.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    return functools.partial(_read_photographs, path, *chance.choice(decoders), chance.random() < 0.5)


# --- Archives -----------------------------------------------------------------------------------------

TABLE = {"train": {"n00000001": (1, 2)}, "val": {"n00000002": (1,)}, "test": {"n00000003": (2,)}}
NAMES_OUT = (
    "../out.png",
    "/tmp/out.png",
    "a/../../out.png",
    "a\0b/1.png",
    "a\n/1.png",
    "a//./1.png",
    "x" * 300,
)


def archives(chance: random.Random, folder: pathlib.Path) -> Feed:
    """Damaged archives of good images, of classes or of ImageNet's synsets."""
    good = images()[4]
    if chance.random() < 0.3:
        synsets = {
            f"{wnid}.tar": _tar({f"{wnid}_{i}.JPEG": good for i in range(1, 4)}, chance)
            for classes in TABLE.values()
            for wnid in classes
        }
        synsets = {name: damaged(chance, raw, 2) for name, raw in synsets.items()}
        (folder / miniimagenet.TAR).write_bytes(damaged(chance, _tar(synsets, chance), 3))
        return functools.partial(_read_mini_imagenet, folder)
    tree = {f"class{c}/{i}.png": good for c in range(3) for i in range(2)}
    if chance.random() < 0.3:
        tree[chance.choice(NAMES_OUT)] = good
    kind = chance.choice((".tar", ".zip"))
    raw = (_tar if kind == ".tar" else _zip)(tree, chance)
    (folder / f"photos{kind}").write_bytes(damaged(chance, raw))
    return functools.partial(
        _read_photographs, folder / f"photos{kind}", decode.decode_photograph, 3, chance.random() < 0.5
    )


def _read_mini_imagenet(folder: pathlib.Path) -> None:
    found = cached(miniimagenet.find([folder], TABLE), decode=miniimagenet.decode, shape=(84, 84, 3))
    for split, classes in TABLE.items():
        assert found[split].classes == tuple(classes)
        assert found[split].offsets.tolist() == [0, *np.cumsum([len(rows) for rows in classes.values()])]


# --- Pickles ------------------------------------------------------------------------------------------


class _Calls:
    def __init__(self, function: Callable, *arguments: object):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
GLOBALS = [
    b"c" + name.replace(" ", "\n").encode() + b"\n"
    for name in (
        *("numpy dtype", "numpy ndarray", "numpy.core.multiarray _reconstruct"),
        *("numpy.core.multiarray scalar", "numpy._core.numeric _frombuffer", "_codecs encode"),
        *("builtins dict", "builtins set", "builtins bytes", "collections OrderedDict"),
        *("os system", "builtins eval", "builtins getattr", "maml.datasets.images.pickles load"),
    )
]  # fmt: skip


@functools.cache
def _contents() -> tuple[object, ...]:
    rows = {"n00000001": [0, 1], "n00000002": [0], "n00000003": [0]}
    few = {
        split: {
            "image_data": np.zeros((sum(map(len, classes.values())), 84, 84, 3), np.uint8),
            "class_dict": {wnid: rows[wnid] for wnid in classes},
        }
        for split, classes in TABLE.items()
    }
    mixed = {
        "a": np.arange(6.0).reshape(2, 3),
        b"b": (1, 2.5, None, True, "é"),
        "c": {3, 4},
        "d": np.float32(2),
    }
    return (few["train"], few["val"], few["test"], mixed, _Calls(os.system, "touch was_run"))


def _program(chance: random.Random) -> bytes:
    """Any instructions in any order, which mostly end at once, and at times do not."""
    parts = [b"\x80" + bytes([chance.randint(0, 5)])]
    for _ in range(chance.randint(1, 60)):
        match chance.randrange(5):
            case 0:
                parts.append(chance.choice(GLOBALS))
            case 1:
                parts.append(
                    pickle.dumps(chance.choice((0, 10**30, -1.5, "u1", b"x", (), [], {}, None)), 2)[2:-1]
                )
            case 2:
                parts.append(
                    chance.choice((b"(", b"t", b"R", b"b", b"o", b"\x81", b"\x85", b"\x86", b"\x87", b"0"))
                )
            case 3:
                parts.append(chance.choice(OPCODES) + chance.randbytes(chance.choice((0, 1, 2, 4, 8))))
            case 4:
                size = chance.choice(EXTREMES)
                parts.append(chance.choice((b"r", b"B", b"X", b"T", b"j", b"\x8b")) + struct.pack("<I", size))
    return b"".join(parts) + b"."


def pickles(chance: random.Random, folder: pathlib.Path) -> Feed:
    """Damaged pickles, pickles that ask for code, and random programs, as files of mini-ImageNet or alone."""
    if chance.random() < 0.3:
        for split, contents in zip(TABLE, _contents(), strict=False):
            raw = pickle.dumps(contents, protocol=chance.randint(0, 5))
            (folder / miniimagenet.PICKLES[split]).write_bytes(damaged(chance, raw, 2))
        return functools.partial(_read_mini_imagenet, folder)
    if chance.random() < 0.5:
        raw = _program(chance)
    else:
        raw = pickle.dumps(chance.choice(_contents()[3:]), protocol=chance.randint(0, 5))
        raw = raw.replace(b"_core", b"core") if chance.random() < 0.2 else raw
        at = chance.randint(2, len(raw))
        raw = raw[:at] + _program(chance)[2:-1] + raw[at:] if chance.random() < 0.3 else damaged(chance, raw)
    (folder / "a.pkl").write_bytes(raw)
    return functools.partial(safe_pickle.load, folder / "a.pkl")


READERS: dict[str, Callable[[random.Random, pathlib.Path], Feed]] = {
    "flags": flags,
    "pictures": pictures,
    "archives": archives,
    "pickles": pickles,
}
