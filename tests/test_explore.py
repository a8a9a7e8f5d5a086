"""The page, by NiceGUI's own simulation of a visitor, and the mistakes of those who open it."""

import asyncio
import functools
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from nicegui.testing import user_simulation

import explore
from baselines.command import generator_file
from baselines.stylegan_t import StyleGANT
from clip import load_clip
from common.cli import UserError
from sampling import settings
from sampling.pipeline import Pipeline
from sampling.sheet import Point, Sheet
from tests import figures
from weights.generator_file import DEMO, save_generator


def visit(script, *checkpoints, prompt="red heart", models=None):
    """Opens the page and runs script(user, page)."""
    args = explore.parse_args(["--device", "cpu"])
    pages, failures = [], []

    def root():
        load = models or functools.cache(functools.partial(explore.load_model, args))
        pages.append(explore.Page(load, checkpoints, prompt))

    async def session():
        async with user_simulation(root) as user:
            await user.open("/")
            try:
                await drawn(pages[0])
                await script(user, pages[0])
            except Exception as error:  # raised here it would leave the page's tasks behind, which never end
                failures.append(error)

    asyncio.run(session())
    for failure in failures:
        raise failure


async def drawn(page):
    """Waits until the page shows what is wanted."""
    for _ in range(600):
        await asyncio.sleep(0.05)
        if not (page.busy or page.again) and (page.shown or page.note.text):
            return
    raise TimeoutError


@pytest.fixture
def base(tmp_path):
    """The demo's first stage alone."""
    return shutil.copy(DEMO, tmp_path)


def test_the_page_shows_what_the_pipeline_draws(base):
    async def script(user, page):
        expected = Pipeline.load(base, device="cpu").sample("red heart", num=4, seed=0)
        assert page.image.source == Sheet(4, 64).joined(expected)
        page.prompt.value = "a mauve whale"
        await asyncio.sleep(0)
        await drawn(page)
        assert page.image.source != Sheet(4, 64).joined(expected)
        page.prompt.value = "word " * 500
        await asyncio.sleep(0)
        await drawn(page)
        assert "too long" in page.note.text
        page.prompt.value = " "
        await asyncio.sleep(0)
        await drawn(page)
        assert "say what to draw" in page.note.text

    visit(script, base)


def test_a_point_tells_its_expert_and_can_be_given_to_another(base):
    async def script(user, page):
        page.router.value = "8.0.0"
        await asyncio.sleep(0)
        page.click(SimpleNamespace(image_x=36, image_y=34))
        before, picture = int(page.routing.expert_index[0, 36]), page.image.source
        assert f"Row 5, column 5 of picture 1: expert {before} took it" in page.told.text
        await page.force((before + 1) % 4)
        await drawn(page)
        assert int(page.routing.expert_index[0, 36]) == (before + 1) % 4 and page.image.source != picture
        await page.release()
        await drawn(page)
        assert page.image.source == picture

    visit(script, base)


def test_more_like_a_picture_keeps_it(base):
    async def script(user, page):
        page.click(SimpleNamespace(image_x=64 + 2 + 5, image_y=5))
        second = page.drawn.images[1]
        page.more_like_this()
        await asyncio.sleep(0)
        await drawn(page)
        torch.testing.assert_close(page.drawn.images[0], second)

    visit(script, base)


def test_a_baseline_stands_where_aurora_stood(tmp_path):
    clip = load_clip("emoji")
    system = StyleGANT(clip, 32, torch.device("cpu"))
    path = tmp_path / "generator_ema.safetensors"
    save_generator(path, *generator_file(system, {"clip": "emoji"}))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"text")

    async def script(user, page):
        page.checkpoint.value = path
        await asyncio.sleep(0)
        await drawn(page)
        assert page.drawn.images.shape == (4, 3, 32, 32) and not page.psi.enabled and "Aurora's" in page.told.text
        page.checkpoint.value = broken
        await asyncio.sleep(0)
        await drawn(page)
        assert "is damaged" in page.note.text

    visit(script, figures.generator_file(), path, broken)


def test_a_walk_ends_with_its_model_and_a_click_on_what_goes_stops_nothing(base):
    async def script(user, page):
        page.start_or_stop()
        page.offer(page.model)
        assert not page.walking.active
        page.num.value = 2
        await asyncio.sleep(0)
        page.router.value = page.router.options[1]
        page.point = Point(3, 0)  # the fourth picture of those still shown
        await asyncio.sleep(0)
        page.point = Point(3, 0)
        await drawn(page)
        assert page.point is None and page.shown.num == 2 and not page.note.text

    visit(script, base)


def test_what_the_page_sends_is_held_within_bounds():
    async def script(user, page):
        for control in (page.num, page.psi, page.seed, page.amount):
            for sent in (10**7, -5, None, 1e300):
                control.value = sent
                wanted = page.wanted()
                assert 1 <= wanted.num <= settings.MOST and 0 <= wanted.psi <= 1.5
                assert 0 <= wanted.seed <= 2**53 and 0 <= wanted.amount <= 1
        page.prompt.value = page.second.value = "word " * 100_000
        assert len(page.wanted().prompt) <= 1000 and len(page.wanted().second) <= 1000
        assert [explore.within(sent, 1, 9) for sent in (float("nan"), "x", [1], "5", 5)] == [1, 1, 1, 5, 5]

    class Held:
        """In place of the models: nothing is drawn."""

        def __call__(self, path):
            raise UserError("no model")

    visit(script, "none", models=Held())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"127.0.0.1:8080", 200),
        (b"localhost", 200),
        (b"[::1]:8080", 200),
        (b"192.168.0.7:80", 200),
        (b"Desk.local:8080", 200),
        (b"evil.example:8080", 400),
        (b"127.0.0.1.evil.example", 400),
        (b"", 400),
    ],
)
def test_the_page_is_served_under_names_of_this_machine_alone(host, status):
    sent = []

    async def served(scope, receive, send):
        await send({"status": 200})

    async def send(message):
        sent.append(message)

    for kind in ("http", "websocket"):
        sent.clear()
        scope = {"type": kind, "headers": [(b"host", host)], "extensions": {"websocket.http.response": {}}}
        asyncio.run(explore.KnownHosts(served, ["localhost", "desk.local"])(scope, None, send))
        assert sent[0]["status"] == status


def test_mistakes_are_told_in_one_line(run_main, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, stderr = run_main(explore.main, "--port", port)
        assert status == 2 and f"port {port}" in stderr and "another --port" in stderr and stderr.count("\n") == 0
        free = port
    (tmp_path / "a.safetensors").write_bytes(b"text")
    for name, says in (("a.safetensors", "is damaged"), ("none.pth", "no generator")):
        status, _, stderr = run_main(explore.main, "--checkpoint", tmp_path / name, "--port", free, "--device", "cpu")
        assert status == 2 and says in stderr and stderr.count("\n") == 0
    status, _, stderr = run_main(explore.main, "--port", 70_000)
    assert status == 2 and "70000" in stderr and stderr.count("\n") == 0


def test_the_second_stage_draws_when_the_page_rests(monkeypatch):
    """A change while it draws ends that; an error of its own is told, and the next redraw works."""

    async def script(user, page):
        assert page.drawn.images.shape == (4, 3, 256, 256)
        enlarge, calls = explore.pipeline.enlarge, []

        def change_or_fail(*arguments):
            calls.append(arguments)
            if len(calls) == 1:
                page.again = True  # as a control does that is moved meanwhile
            if len(calls) == 3:
                raise RuntimeError("no memory is left")
            return enlarge(*arguments)

        monkeypatch.setattr(explore.pipeline, "enlarge", change_or_fail)
        await page.refresh()
        assert len(calls) == 3 and "no memory is left" in page.note.text and page.drawn.images.shape[-1] == 64
        await page.refresh()
        assert len(calls) == 7 and not page.note.text and page.drawn.images.shape[-1] == 256

    visit(script, DEMO)


def test_keys_change_the_seed(base):
    async def script(user, page):
        for key, seed in (("n", 1), ("n", 2), ("p", 1), ("p", 0), ("p", 0)):
            await page.press(SimpleNamespace(action=SimpleNamespace(keydown=True), key=key))
            assert page.seed.value == seed

    visit(script, base)
