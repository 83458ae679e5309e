"""Images become the pixels of Hugging Face's Gemma3ImageProcessorPil, or are refused with a sentence."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers import Gemma3ImageProcessorPil

from gemma3.image import MAX_PIXELS, load_image, pan_and_scan

SIZE = 56
MODES = ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "I;16", "I", "F", "YCbCr", "HSV"]


def processor(size: int, **settings) -> Gemma3ImageProcessorPil:
    return Gemma3ImageProcessorPil(size={"height": size, "width": size}, do_convert_rgb=True, **settings)


def assert_same_pixels(images: list[np.ndarray], pixel_values: np.ndarray) -> None:
    """`pixel_values` is float32[I, 3, h, w] in [-1, 1]; equality is exact."""
    ours = np.stack(images)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(np.float32(ours) / np.float32(127.5) - 1, pixel_values.transpose(0, 2, 3, 1))


def noise(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """An image in which every pixel differs from its neighbours, transparency included."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 400, (height, width), dtype=np.uint16))
    if mode in ("I", "F"):
        return Image.fromarray(rng.integers(0, 256, (height, width)).astype(np.int32 if mode == "I" else np.float32))
    rgba = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode == "PA":
        return rgba.convert("LA").convert("PA")
    return rgba if mode == "RGBA" else rgba.convert("LA" if mode == "LA" else "RGB").convert(mode)


def encoded(image: Image.Image, fmt: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, fmt, **options)
    return data.getvalue()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width, height", [(17, 31), (211, 97), (SIZE, SIZE)], ids=["enlarged", "shrunk", "same size"])
def test_every_mode_equals_hugging_face(mode, width, height):
    image = noise(mode, width, height)
    assert image.mode == mode
    expected = processor(SIZE)(image, return_tensors="np")["pixel_values"]
    assert_same_pixels([load_image(image, SIZE)], expected)


def test_published_size_equals_hugging_face():
    image = noise("RGB", 401, 1203)
    assert_same_pixels([load_image(image, 896)], processor(896)(image, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize(
    "mode, kind",
    [
        ("P", "one colour"),
        ("P", "an alpha per colour"),
        ("L", "one colour"),
        ("RGB", "one colour"),
        ("1", "one colour"),
    ],
)
def test_transparency_of_a_png_is_white_as_in_hugging_face(mode, kind):
    """Transparency kept beside the pixels (a PNG's tRNS chunk)."""
    image = noise(mode, 40, 23)
    transparency = image.getpixel((0, 0)) if kind == "one colour" else bytes(range(256))
    data = encoded(image, "PNG", transparency=transparency)
    opened = Image.open(io.BytesIO(data))
    assert_same_pixels([load_image(data, SIZE)], processor(SIZE)(opened, return_tensors="np")["pixel_values"])
    if kind == "one colour":
        assert load_image(data, None)[0, 0].tolist() == [255, 255, 255]


def test_transparent_pixels_are_white_whatever_colour_they_hide():
    image = Image.new("RGBA", (3, 2), (200, 10, 10, 0))
    image.putpixel((1, 0), (200, 10, 10, 255))
    expected = np.full((2, 3, 3), 255, np.uint8)
    expected[0, 1] = (200, 10, 10)
    np.testing.assert_array_equal(load_image(image, None), expected)


class InMemory:
    """An object that is no path but has a path's method `read_bytes`."""

    def __init__(self, content: bytes):
        self.read_bytes = lambda: content


def test_a_path_its_text_its_bytes_what_returns_them_and_a_pillow_image_are_one_image(tmp_path):
    image = noise("RGB", 31, 17)
    path = tmp_path / "image.png"
    image.save(path)
    expected = np.array(image)
    for source in (path, str(path), path.read_bytes(), InMemory(path.read_bytes()), image):
        np.testing.assert_array_equal(load_image(source, None), expected)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_files_of_each_format_equal_hugging_face(fmt):
    data = encoded(noise("RGB", 61, 43), fmt)
    expected = processor(SIZE)(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"]
    assert_same_pixels([load_image(data, SIZE)], expected)


def test_a_file_is_turned_upright_and_a_pillow_image_is_not():
    image = noise("RGB", 5, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to see it upright
    data = encoded(image, "PNG", exif=exif)
    np.testing.assert_array_equal(load_image(data, None), np.rot90(np.array(image), -1))
    np.testing.assert_array_equal(load_image(Image.open(io.BytesIO(data)), None), np.array(image))


def test_loading_does_not_change_the_given_image():
    image = noise("P", 9, 7)
    before = image.copy()
    load_image(image, SIZE)
    assert image.mode == "P" and image.tobytes() == before.tobytes()


PAN_AND_SCAN = [
    ((1199, 1000), 0),
    ((1200, 1000), 2),
    ((2500, 1000), 3),
    ((1000, 2600), 3),
    ((5000, 900), 4),
    ((600, 400), 2),
    ((511, 256), 2),
    ((510, 256), 0),
    ((255, 2000), 0),
    ((700, 700), 0),
    ((257, 1027), 4),
]


@pytest.mark.parametrize("image_size, num_crops", PAN_AND_SCAN)
def test_pan_and_scan_equals_hugging_face(image_size, num_crops):
    image = noise("RGB", *image_size)
    settings = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 256,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    expected = processor(SIZE, **settings)(image, return_tensors="np")
    images = pan_and_scan(load_image(image, None), SIZE)
    assert len(images) - 1 == num_crops == expected["num_crops"][0]
    assert_same_pixels(images, expected["pixel_values"])
    np.testing.assert_array_equal(images[0], load_image(image, SIZE))


def test_real_images_equal_hugging_face(shared_data):
    paths = sorted((shared_data / "mathvista" / "images_sample").glob("*.png"))
    assert paths
    for path in paths:
        expected = processor(896)(Image.open(path), return_tensors="np")["pixel_values"]
        assert_same_pixels([load_image(path, 896)], expected)


def one_sentence(message: str) -> bool:
    return "\n" not in message and len(message) < 300


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_truncated_file_is_refused_by_name(fmt, tmp_path):
    data = encoded(noise("RGB", 61, 43), fmt)
    path = tmp_path / f"half.{fmt.lower()}"
    for kept in (len(data) // 2, 20, 3):
        path.write_bytes(data[:kept])
        with pytest.raises(ValueError, match=r"half\.\w+ cannot be read: ") as error:
            load_image(path, SIZE)
        assert one_sentence(str(error.value))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_read_or_refused_by_name(seed):
    """Whatever is wrong inside a file, the caller gets pixels or one kind of error."""
    rng = np.random.default_rng(seed)
    fmt = ["PNG", "JPEG", "WEBP", "GIF", "TIFF"][seed % 5]
    data = np.frombuffer(encoded(noise("RGB", 61, 43), fmt), np.uint8).copy()
    data[rng.integers(0, len(data), 20)] = rng.integers(0, 256, 20)
    try:
        assert load_image(data.tobytes(), SIZE, "damaged").shape == (SIZE, SIZE, 3)
    except ValueError as error:
        assert str(error).startswith("damaged cannot be read: ") and one_sentence(str(error))


def test_missing_empty_and_foreign_files_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.png cannot be read: No such file or directory$"):
        load_image(tmp_path / "nowhere.png", SIZE)
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory$"):
        load_image(tmp_path, SIZE)
    with pytest.raises(ValueError, match=r"^row 7 cannot be read: its content is none of PNG, JPEG"):
        load_image(b"", SIZE, "row 7")
    with pytest.raises(ValueError, match=r"^row 7 cannot be read: its content is none of"):
        load_image(b"<svg></svg>", SIZE, name="row 7")
    with pytest.raises(ValueError, match=r"^the image cannot be read: its content is none of"):
        load_image(encoded(noise("RGB", 4, 4), "EPS"), SIZE)
    with pytest.raises(ValueError, match=r"^the image cannot be read: it is 0 x 5 pixels$"):
        load_image(Image.new("RGB", (0, 5)), SIZE)


def bomb(width: int, height: int) -> bytes:
    """A grey PNG whose header declares width x height pixels, and which holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the image was decoded"))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("the image was decoded"))
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(10_000, 1 + MAX_PIXELS // 10_000))
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read: it is 10000 x 8001 pixels, more than the limit"):
        load_image(path, SIZE)
    with pytest.raises(ValueError, match=r"cannot be read: .* exceeds limit"):
        load_image(bomb(60_000, 60_000), SIZE)


def test_an_image_of_the_largest_size_is_accepted():
    assert load_image(Image.new("L", (MAX_PIXELS // 10_000, 10_000), 9), 2).tolist() == [[[9] * 3] * 2] * 2


def test_threads_load_the_same_pixels():
    data = [encoded(noise("RGBA", 61, 43, seed), "PNG") for seed in range(8)]
    expected = [load_image(d, SIZE) for d in data]
    wrong = []

    def check(i: int) -> None:
        if not all(np.array_equal(load_image(data[j % 8], SIZE), expected[j % 8]) for j in range(i, i + 16)):
            wrong.append(i)

    threads = [threading.Thread(target=check, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
