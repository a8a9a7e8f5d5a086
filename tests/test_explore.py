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
from baselines.shared import generator_file
from baselines.stylegan_t import StyleGANT
from clip import load_clip
from sampling import views
from sampling.page import Settings, frames
from sampling.pipeline import Pipeline
from weights.generator_file import DEMO, save_generator

PLAIN = dict(prompt="red heart", seed=3, num=2, layers=[], centre=[], forced=None)


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Of the demo, a StyleGAN-T and a file that is none."""
    folder = tmp_path_factory.mktemp("models")
    system = StyleGANT(load_clip("emoji"), 32, torch.device("cpu"))
    save_generator(folder / "baseline.safetensors", *generator_file(system, {"clip": "emoji"}))
    (folder / "broken.safetensors").write_bytes(b"text")
    args = explore.parse_args(["--device", "cpu", "--checkpoint", str(DEMO), *map(str, sorted(folder.iterdir()))])
    args.port = 0
    with explore.Server(args) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def request(server, method, path, body=None, host="localhost"):
    connection = http.client.HTTPConnection(*server.server_address)
    connection.request(method, path, body, {"Host": host})
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


@pytest.fixture
def ask(server):
    """Changes of PLAIN → the answer."""

    def ask(path="/draw", model=0, router="", number=0, **changes):
        sent = {"model": model, "router": router, "number": number, "settings": json.dumps(PLAIN | changes)}
        status, answer = request(server, "POST", path, json.dumps(sent))
        assert status == 200
        return json.loads(answer)

    return ask


def opened(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))), int)


def test_the_page_and_what_it_shows_first(server):
    status, stdout = request(server, "GET", "/")
    assert status == 200 and "<title>Aurora" in stdout and request(server, "POST", "/none", "{}")[0] == 404
    start = json.loads(request(server, "POST", "/start", "{}")[1])
    assert start["prompt"] == "red heart" and len(start["models"]) == 3


def test_plain_settings_draw_what_the_pipeline_draws(ask):
    small = Pipeline.load(device="cpu", resolution=64).sample("red heart", num=2, seed=3, psi=0.5)
    answer = ask(psi=0.5)
    assert all(np.array_equal(opened(url), np.asarray(p)) for url, p in zip(answer["pictures"], small, strict=True))
    large = Pipeline.load(device="cpu").sample("red heart", num=2, seed=3, psi=0.5)[1]
    assert np.abs(opened(ask("/enlarge", number=1, psi=0.5)) - np.asarray(large)).max() <= 1  # another batch
    assert answer["second_stage"] and answer["routers"] == ["8.0.0", "16.0.0"] and not answer["note"]


def test_the_way_between_two_prompts_is_that_of_views(pipe):
    (half,) = frames(pipe, Settings("red heart", 3, 1, second="whale", amount=0.5))
    with torch.no_grad():
        way = pipe.view(views.interpolation, ("red heart", "whale"), 3, 1.0, 3)
    for ours, expected in ((half, way[1]), (half.large, way[1].large)):
        torch.testing.assert_close(ours.w, expected.w)
        torch.testing.assert_close(ours.local_text, expected.local_text)


def test_chosen_layers_of_both_stages_follow_the_second_prompt(pipe):
    own = pipe.generator.synthesis.num_layers
    (first,), (second,) = (pipe.frames(prompt, seed=3) for prompt in ("red heart", "whale"))
    (mixed,) = frames(pipe, Settings("red heart", 3, 1, second="whale", layers=(0, 2, own)))
    for m, a, b, chosen in ((mixed, first, second, [0, 2]), (mixed.large, first.large, second.large, [0])):
        expected = a.w.clone()
        expected[chosen] = b.w[chosen]
        torch.testing.assert_close(m.w, expected)
        torch.testing.assert_close(m.local_text, a.local_text)


def test_more_like_a_picture_keeps_it_and_draws_similar_ones(ask):
    before = ask()
    after = ask(centre=before["z"][1], seed=4)
    assert np.abs(opened(after["pictures"][0]) - opened(before["pictures"][1])).max() <= 1
    assert 0.8 < torch.cosine_similarity(*map(torch.tensor, after["z"]), dim=0) < 1


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


def test_a_baseline_takes_a_prompt_a_seed_and_a_number(ask):
    answer = ask(model=1)
    assert [opened(url).shape for url in answer["pictures"]] == [(32, 32, 3)] * 2
    assert answer["baseline"] == "StyleGANT" and not answer["layers"] and not answer["routers"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": 2}, "is damaged"),
        ({"forced": {"router": "8.0.0", "points": [[0, 9999]], "expert": 0}}, "with size 64; reload the page"),
        ({"layers": [-1]}, "an index is negative"),
        ({"num": 17}, "ask for 1 to 16 pictures"),
        ({"path": "/enlarge", "number": 0, "model": 1}, "no second stage"),
    ],
)
def test_any_error_is_a_sentence_and_the_next_draws(ask, changes, says):
    answer = ask(**changes)
    assert says in answer["error"] and "\n" not in answer["error"]
    assert len(ask()["pictures"]) == 2
    assert "too long" in ask(prompt="word " * 200)["note"] and "does not know 🍕" in ask(prompt="🍕")["note"]


def test_the_page_is_served_under_names_of_this_machine_alone(server):
    for host in ("127.0.0.1:8080", "LocalHost", "[::1]:8080"):
        assert request(server, "GET", "/", host=host)[0] == request(server, "POST", "/start", "{}", host)[0] == 200
    for host in ("evil.example:8080", "127.0.0.1.evil.example", ""):
        assert request(server, "GET", "/", host=host)[0] == request(server, "POST", "/start", "{}", host)[0] == 400


def test_mistakes_are_one_line(run_main, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
        status, _, stderr = run_main(explore.main, "--port", free)
        assert status == 2 and f"port {free}" in stderr and "another --port" in stderr and stderr.count("\n") == 0
    status, _, stderr = run_main(explore.main, "--checkpoint", tmp_path / "none.pth", "--port", free)
    assert status == 2 and "no generator" in stderr and stderr.count("\n") == 0
