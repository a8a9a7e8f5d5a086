"""The page's server draws what the page sets as Pipeline and views draw it, and survives what else it is sent."""

import base64
import http.client
import io
import json
import socket
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import explore
from sampling import latent, views
from sampling.page import Settings, frames, noise
from sampling.pipeline import Pipeline
from tests.conftest import assert_one_line


@pytest.fixture(scope="module")
def server():
    args = explore.parse_args(["--device", "cpu"])
    args.port = 0
    with explore.Server(args) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def request(server, method, path, body=None):
    connection = http.client.HTTPConnection(*server.server_address)
    connection.request(method, path, body)
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


@pytest.fixture
def ask(server):
    """Changes of plain settings → the answer."""
    plain = dict(prompt="red heart", seed=3, num=2, layers=[], forced=None)

    def ask(path="/draw", router="", number=0, **changes):
        sent = {"router": router, "number": number, "settings": json.dumps(plain | changes)}
        status, answer = request(server, "POST", path, json.dumps(sent))
        assert status == 200
        return json.loads(answer)

    return ask


def opened(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))), int)


def test_the_page_and_what_it_shows_first(server):
    status, stdout = request(server, "GET", "/")
    assert status == 200 and "<title>Aurora" in stdout and request(server, "GET", "/none")[0] == 404
    start = json.loads(request(server, "POST", "/start", "{}")[1])
    assert start["prompt"] == "red heart" and start["routers"] == ["8.0.0", "16.0.0"] and start["second_stage"]


def test_plain_settings_draw_what_the_pipeline_draws(ask, pipe):
    small = Pipeline.load(device="cpu", resolution=64).sample("red heart", num=2, seed=3, psi=0.5)
    answer = ask(psi=0.5)
    assert all(np.array_equal(opened(url), np.asarray(p)) for url, p in zip(answer["pictures"], small, strict=True))
    large = pipe.sample("red heart", num=2, seed=3, psi=0.5)[1]
    assert np.abs(opened(ask("/enlarge", number=1, psi=0.5)) - np.asarray(large)).max() <= 1  # another batch
    assert not answer["note"]


def test_the_way_between_two_prompts_is_that_of_views(pipe):
    (half,) = frames(pipe, Settings("red heart", 3, 1, second="whale", amount=0.5))
    with torch.no_grad():
        way = pipe.view(views.interpolation, ("red heart", "whale"), 3, 1.0, 3)
    for ours, expected in ((half, way[1]), (half.large, way[1].large)):
        torch.testing.assert_close(ours.w, expected.w)
        torch.testing.assert_close(ours.local_text, expected.local_text)


def test_a_walk_passes_the_noise_of_the_following_seeds(pipe):
    first, second = (latent.noise(pipe.generator, 2, seed) for seed in (4, 5))
    for walk, expected in ((1.0, first), (1.5, views.between(first, second, 0.5)), (2.0, second)):
        torch.testing.assert_close(noise(pipe.generator, Settings("red heart", 3, 2, walk=walk)), expected)


def test_chosen_layers_of_both_stages_follow_the_second_prompt(pipe):
    own = pipe.generator.synthesis.num_layers
    (first,), (second,) = (pipe.frames(prompt, seed=3) for prompt in ("red heart", "whale"))
    (mixed,) = frames(pipe, Settings("red heart", 3, 1, second="whale", layers=(0, 2, own)))
    for m, a, b, chosen in ((mixed, first, second, [0, 2]), (mixed.large, first.large, second.large, [0])):
        expected = a.w.clone()
        expected[chosen] = b.w[chosen]
        torch.testing.assert_close(m.w, expected)
        torch.testing.assert_close(m.local_text, a.local_text)


def test_points_are_given_to_another_expert_and_released(ask):
    free = ask(router="8.0.0")
    taken = free["routing"]["experts"]
    chances = torch.tensor(free["routing"]["probabilities"])
    torch.testing.assert_close(chances.sum(-1), torch.ones(2, 64))
    assert chances.argmax(-1).tolist() == taken
    points = [(picture, index) for picture in (0, 1) for index in (3, 36)]
    other = (taken[0][36] + 1) % 4
    forced = ask(router="8.0.0", forced={"router": "8.0.0", "points": points, "expert": other})
    assert all(forced["routing"]["experts"][picture][index] == other for picture, index in points)
    assert forced["pictures"] != free["pictures"] and ask(router="8.0.0") == free


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": " "}, "a prompt is empty; say what to draw"),
        ({"forced": {"router": "8.0.0", "points": [[0, 9999]], "expert": 0}}, "with size 64; reload the page"),
    ],
)
def test_any_error_is_a_sentence_and_the_next_draws(ask, changes, says):
    answer = ask(**changes)
    assert says in answer["error"] and "\n" not in answer["error"]
    assert len(ask()["pictures"]) == 2
    assert "too long" in ask(prompt="word " * 200)["note"] and "does not know 🍕" in ask(prompt="🍕")["note"]


def test_mistakes_are_one_line(run_main, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
        for says in (f"port {free}", "another --port"):
            assert_one_line(run_main(explore.main, "--port", free), says)
    assert_one_line(run_main(explore.main, "--checkpoint", tmp_path / "none.pth", "--port", free), "no generator")
