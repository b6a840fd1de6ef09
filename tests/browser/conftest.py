"A real web browser: Debian's Chromium, driven by Playwright. Without them these tests are skipped; `make test-browser` installs and requires them."
import os
import shutil

import pytest

FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync".split()


def missing(what):
    if os.environ.get("STASC_BROWSER") == "required": pytest.fail(f"{what}: `make test-browser` needs it")
    pytest.skip(f"{what}: `make test-browser` installs it and runs these tests")


@pytest.fixture(scope="session")
def chromium():
    "A browser that was started."
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None: missing("no Chromium here")
    try: from playwright.sync_api import sync_playwright
    except ImportError: missing("Python's playwright is not installed")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    context = chromium.new_context(viewport=dict(width=1400, height=900))
    yield context.new_page()
    context.close()
