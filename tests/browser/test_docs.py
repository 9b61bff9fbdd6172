"""Swagger UI in a real Chromium."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import MakeSite, OpenPage
from tests.browser.test_playground import strip_prefix

pytestmark = pytest.mark.process


@pytest.mark.parametrize("path", ["docs", "docs/"])
def test_docs_show_the_routes_below_a_prefix_without_asking_another_host(
    site: MakeSite, open_page: OpenPage, path: str
) -> None:
    url = f"{site(strip_prefix)}fes/"
    page = open_page("about:blank")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))

    page.goto(url + path)

    expect(page.get_by_role("heading", name="Feature Extraction Server")).to_be_visible()
    expect(page.get_by_role("link", name="image_captioning", exact=True)).to_be_visible()
    assert {address for address in asked if not address.startswith((url, "data:"))} == set()


def test_docs_send_a_request_and_show_its_answer(site: MakeSite, open_page: OpenPage) -> None:
    url = f"{site(strip_prefix)}fes/"
    page = open_page(f"{url}docs")

    page.get_by_role("link", name="base API", exact=True).click()
    operation = page.locator("#operations-base_API-base_api_tasks")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Execute").click()

    expect(operation.locator(".live-responses-table .response .microlight").first).to_contain_text("image_captioning")
    expect(operation.locator(".request-url")).to_contain_text(f"{url}api/tasks/list")
