from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dev_server import ROOT
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine
from feature_extraction_server.flask.app import create_app
from tests.plugins.asking import Ask

plugin: Any = importlib.import_module("feature_extraction_server.models.dlib_face_recognition")

pytestmark = pytest.mark.weights

TASK = "face_embedding"
SAME_PERSON = 0.43  # as far as two vectors of length 1 may be from each other: dlib's 0.6 for its own vectors
ONE, OTHER = (Image.open(ROOT / "demo" / "faces" / f"{name}.jpg").convert("RGB") for name in ("astronaut", "hopper"))


def side_by_side(*pictures: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (sum(picture.width for picture in pictures), max(one.height for one in pictures)))
    x = 0
    for picture in pictures:
        canvas.paste(picture, (x, 0))
        x += picture.width
    return canvas


BOTH = side_by_side(ONE, OTHER)
NOBODY = Image.new("RGB", (200, 150), "grey")


@pytest.fixture(scope="module")
def engine_with_faces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    settings = {"LOG_PATH": str(folder / "log.txt"), "DLIB_FACE_RECOGNITION_CONSUMER_TYPE": "single_thread_consumer"}
    engine = build_engine(SettingsManager(settings, folder / ".env"))
    yield engine
    engine.close()


@pytest.fixture
def ask(engine_with_faces: Engine) -> Ask:
    return Ask(create_app(engine_with_faces).test_client(), "dlib_face_recognition")


@pytest.fixture(scope="module")
def weights() -> Path:
    spec = find_spec("face_recognition_models")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "models"


@pytest.fixture(scope="module")
def direct(weights: Path) -> Callable[[Image.Image], list[tuple[list[int], float, Any]]]:
    """``direct(image)`` gives box, score and vector of each face as dlib's own functions alone find them."""
    dlib: Any = importlib.import_module("dlib")
    detector = dlib.get_frontal_face_detector()
    predictor = dlib.shape_predictor(str(weights / "shape_predictor_5_face_landmarks.dat"))
    network = dlib.face_recognition_model_v1(str(weights / "dlib_face_recognition_resnet_model_v1.dat"))

    def find(image: Image.Image) -> list[tuple[list[int], float, Any]]:
        pixels = np.array(image)
        places, scores, _ = detector.run(pixels, 1, 0.0)
        return [
            (
                [place.left(), place.top(), place.right(), place.bottom()],
                score,
                np.array(network.compute_face_descriptor(pixels, predictor(pixels, place))),
            )
            for place, score in zip(places, scores, strict=True)
        ]

    return find


def vectors(faces: list[dict[str, Any]]) -> Any:
    return np.array([face["embedding"] for face in faces])


def distance(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> float:
    (one,), (other,) = vectors(first), vectors(second)
    return float(np.linalg.norm(one - other))


@pytest.mark.parametrize("picture", [ONE, OTHER, BOTH], ids=["one", "other", "both"])
def test_faces_are_those_that_dlib_gives(
    ask: Ask, direct: Callable[[Image.Image], list[tuple[list[int], float, Any]]], picture: Image.Image
) -> None:
    expected = sorted(direct(picture), key=lambda face: face[0][0] - face[0][2])

    faces = ask(TASK, image=picture, config={"normalize": False})

    assert [face["box"] for face in faces] == [box for box, _, _ in expected]
    assert [face["score"] for face in faces] == pytest.approx([score for _, score, _ in expected])
    np.testing.assert_allclose(vectors(faces), [vector for _, _, vector in expected], atol=1e-5)


def test_vectors_have_length_1_unless_the_client_wants_dlib_s_own(ask: Ask) -> None:
    (face,) = ask(TASK, image=ONE)
    (own,) = ask(TASK, image=ONE, config={"normalize": False})

    assert len(face["embedding"]) == 128
    assert np.linalg.norm(face["embedding"]) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(own["embedding"]) > 1.2
    np.testing.assert_allclose(
        face["embedding"], np.array(own["embedding"]) / np.linalg.norm(own["embedding"]), atol=1e-6
    )


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "twice as large": lambda image: image.resize((384, 384)),
    "smaller": lambda image: image.resize((128, 128)),
    "turned": lambda image: image.rotate(10, fillcolor="grey"),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.4),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.5),
    "grey": lambda image: image.convert("L").convert("RGB"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_picture_is_near_to_the_same_person_and_far_from_the_other(ask: Ask, change: str) -> None:
    faces, original, other = ask(TASK, image=[CHANGES[change](ONE), ONE, OTHER])

    assert distance(faces, original) < 0.25
    assert distance(faces, other) > SAME_PERSON


def test_box_lies_around_the_face_wherever_it_is(ask: Ask) -> None:
    canvas = Image.new("RGB", (500, 400), "grey")
    canvas.paste(ONE, (250, 150))

    (face,), (alone,) = ask(TASK, image=[canvas, ONE])

    assert face["box"] == pytest.approx([alone["box"][i] + (250, 150)[i % 2] for i in range(4)], abs=5)


def test_box_is_cut_off_at_the_edge_of_the_picture(ask: Ask) -> None:
    left, top, right, _ = (int(edge) for edge in ask(TASK, image=OTHER)[0]["box"])
    cropped = OTHER.crop((left + 6, top + 8, right - 2, OTHER.height))

    (face,) = ask(TASK, image=cropped)

    assert min(face["box"]) >= 0
    assert face["box"][2] <= cropped.width
    assert 0 in face["box"]


def test_largest_face_comes_first(ask: Ask) -> None:
    small = ONE.resize((130, 130))

    answers = ask(TASK, image=[side_by_side(small, OTHER), side_by_side(OTHER, small)])

    widths = [[face["box"][2] - face["box"][0] for face in faces] for faces in answers]
    assert [len(faces) for faces in answers] == [2, 2]
    assert all(first > second for first, second in widths)


@pytest.mark.parametrize("detector", ["hog", "cnn"])
@pytest.mark.parametrize(
    "picture",
    [NOBODY, Image.new("RGB", (1, 1)), Image.new("RGB", (2, 300)), Image.new("RGB", (3000, 1))],
    ids=["grey", "one pixel", "high", "wide"],
)
def test_picture_without_a_face_gives_an_empty_list(ask: Ask, picture: Image.Image, detector: str) -> None:
    assert ask(TASK, image=picture, config={"detector": detector}) == []


def test_faces_of_a_batch_are_those_of_its_pictures_alone(ask: Ask) -> None:
    pictures = [BOTH, NOBODY, OTHER, BOTH.resize((300, 150)), ONE]

    answers = ask(TASK, image=pictures)

    alone = [ask(TASK, image=picture) for picture in pictures]
    assert [[face["box"] for face in faces] for faces in answers] == [[face["box"] for face in one] for one in alone]
    for faces, one in zip(answers, alone, strict=True):
        np.testing.assert_allclose(vectors(faces), vectors(one), atol=1e-4)


def test_network_sees_a_bounded_number_of_faces_at_a_time(
    ask: Ask, engine_with_faces: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(TASK, image=ONE)
    sizes: list[int] = []

    class Network:
        def compute_face_descriptor(self, chips: list[Any]) -> list[Any]:
            sizes.append(len(chips))
            return network.compute_face_descriptor(chips)  # type: ignore[no-any-return]

    network = plugin.network
    monkeypatch.setattr(plugin, "network", Network())
    monkeypatch.setattr(plugin, "CHIPS_A_CALL", 2)

    faces = ask(TASK, image=[BOTH, ONE])

    assert sizes == [2, 1]
    assert [len(one) for one in faces] == [2, 1]


def test_network_finds_the_same_faces_as_gradients(ask: Ask) -> None:
    by_gradients = ask(TASK, image=ONE)
    by_network = ask(TASK, image=ONE, config={"detector": "cnn"})

    assert distance(by_gradients, by_network) < 0.25
    assert by_network[0]["box"] == pytest.approx(by_gradients[0]["box"], abs=20)


def test_network_s_boxes_are_those_that_dlib_gives(ask: Ask, weights: Path) -> None:
    dlib: Any = importlib.import_module("dlib")
    (expected,) = dlib.cnn_face_detection_model_v1(str(weights / "mmod_human_face_detector.dat"))(np.array(ONE), 0)

    (face,) = ask(TASK, image=ONE, config={"detector": "cnn"})

    place = expected.rect
    assert face["box"] == [place.left(), place.top(), place.right(), place.bottom()]
    assert face["score"] == pytest.approx(expected.confidence, abs=1e-5)


def test_small_face_is_found_once_the_picture_is_upsampled_more(ask: Ask) -> None:
    small = ONE.resize((96, 96))

    assert ask(TASK, image=small, config={"upsample": 0}) == []
    assert len(ask(TASK, image=small, config={"upsample": 2})) == 1


def test_threshold_leaves_out_faces_of_lower_scores(ask: Ask) -> None:
    scores = sorted(face["score"] for face in ask(TASK, image=BOTH))

    faces = ask(TASK, image=BOTH, config={"threshold": sum(scores) / 2})

    assert [face["score"] for face in faces] == scores[1:]


@pytest.mark.parametrize("detector", ["hog", "cnn"])
def test_picture_of_too_many_pixels_is_searched_in_a_smaller_size(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, detector: str
) -> None:
    ask(TASK, image=ONE)
    large = ONE.resize((768, 768))
    limited = plugin.Detector(plugin.detectors[detector].model, 0, 300 * 300)
    monkeypatch.setitem(plugin.detectors, detector, limited)

    large_answer, answer = ask(
        TASK, image=[large, ONE.resize((300, 300))], config={"detector": detector, "upsample": 2}
    )

    assert large_answer[0]["box"] == pytest.approx([edge * 768 / 300 for edge in answer[0]["box"]], abs=12)
    assert distance(large_answer, answer) < 0.2


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"detector": "eyes"}, "config.detector"),
        ({"upsample": 4}, "config.upsample"),
        ({"upsample": 1.5}, "config.upsample"),
        ({"threshold": -1}, "config.threshold"),
        ({"normalize": "yes"}, "config.normalize"),
        ({"num_jitters": 3}, "config.num_jitters"),
    ],
    ids=str,
)
def test_what_config_may_not_hold_is_named(ask: Ask, config: dict[str, Any], field: str) -> None:
    response = ask.response(TASK, image=ONE, config=config)

    assert response.status_code == 400
    assert response.json["field"] == field


def test_missing_weights_are_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "PACKAGE", "no_such_package")

    with pytest.raises(ModelLoadFailed, match="face-recognition-models, which has the weights, is not installed"):
        plugin.load_model()


def test_broken_weights_are_told_with_their_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "broken_models"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "models" / "mmod_human_face_detector.dat").write_bytes(b"nothing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugin, "PACKAGE", "broken_models")

    with pytest.raises(ModelLoadFailed, match="broken_models/models are incomplete or broken"):
        plugin.load_model()


def test_model_tells_where_its_vectors_come_from() -> None:
    assert plugin.provenance() == {
        "checkpoint": "face-recognition-models",
        "revision": "0.3.0",
        "dtype": "float32",
        "device": "cpu",
    }


def test_model_runs_in_a_process_of_its_own(build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(plugin, "network", raising=False)
    ask_apart = Ask(create_app(build()).test_client(), "dlib_face_recognition")

    (face,) = ask_apart(TASK, image=ONE)

    assert len(face["embedding"]) == 128
    assert not hasattr(plugin, "network")
