from __future__ import annotations

from flask.testing import FlaskClient


def test_image_goes_in_and_caption_comes_out(client: FlaskClient, picture: str) -> None:
    response = client.post("/api/tasks/image_captioning/models/fake_echo/features", json={"image": picture})

    assert response.status_code == 200
    assert response.json == ["40x30 (255, 0, 0)"]
