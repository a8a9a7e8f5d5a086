"""Opens a page to play with a generator: `python explore.py`, then the address that it prints.

Prompts and the way between them, layers, noise, walks, and which expert takes which point. The page is served to this
machine alone, unless --host says otherwise, and needs no network.
"""

import argparse
import asyncio
import dataclasses
import functools
import ipaddress
import math
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from nicegui import app, ui
from starlette.responses import PlainTextResponse

from baselines import command
from common import distributed
from common.cli import HelpFormatter, UserError, a_path, first_line, positive_int, told_in_one_line
from sampling import inference, latent, pipeline, settings, views
from sampling.pictures import COLORS, in_range
from sampling.pipeline import Drawn, Pipeline, routers
from sampling.settings import Forced, Settings
from sampling.sheet import Sheet
from weights.generator_file import DEMO, generator_of

EXAMPLES = ("red heart", "cat face", "crying face", "sunflower", "watermelon", "a cute kitty")
PARTS = {"both": "global and local text", "global": "global text", "local": "local text"}
SCOPES = {"point": "this point", "picture": "all of its expert's here", "all": "all of its expert's, in every picture"}
NO_ROUTER = "none"
MOST_PSI = 1.5
MOST_TEXT = 1000  # characters of a prompt
CELL = 256  # CSS pixels of a picture
TYPING = "debounce=250"  # milliseconds without a key after which a prompt counts as typed
CSS = """
.page { display: grid; grid-template-columns: minmax(0, 1fr) 20rem; gap: 2rem;
        width: 100%; max-width: 84rem; margin: auto; align-items: start }
@media (max-width: 56rem) { .page { grid-template-columns: minmax(0, 1fr) } }
"""
WALK_EVERY, WALK_STEP = 0.1, 0.04  # seconds between two pictures, and the share of the way between two seeds
REST = 0.3  # seconds without a change after which the second stage draws what the first has drawn
DRAWING = ThreadPoolExecutor(1)  # pictures are drawn one after another, so no page meets another's forced expert


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?", default="red heart", help="what the page draws at first")
    add(
        "--checkpoint",
        type=a_path,
        nargs="+",
        default=[DEMO],
        help="to choose from: runs, baselines' too, their generator_ema.safetensors, or the authors' aurora_v1.pth",
    )
    add(
        "--clip", help="MODEL:WEIGHTS of open_clip, to read a large CLIP from a file; default: what the checkpoint says"
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *inference.DTYPES), default="auto", help="auto: bf16 for large models, if fast")
    add("--host", default="127.0.0.1", help="the address to serve at; 0.0.0.0 lets other machines in")
    add("--port", type=positive_int, default=8080)
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# Models.


class Baseline:
    """A system of baselines/. It draws by prompt, seed and number; what else a Settings says is Aurora's."""

    def __init__(self, system):
        self.name, self.system, self.clip = type(system).__name__, system, system.clip.text

    @torch.no_grad()
    def draw(self, wanted):
        text = self.system.clip.read([wanted.prompt])
        images = self.system.sample(text, wanted.seed, wanted.num)
        return Drawn(in_range(images), [wanted.prompt] * wanted.num, {})


def load_model(args, path):
    """A Pipeline or a Baseline. Raises UserError."""
    path = generator_of(path)
    if system_class := command.system_of(path):
        system, _ = command.load(system_class, path, distributed.start(args.device))
        return Baseline(system)
    return Pipeline.load(path, args.device, args.dtype, args.clip)


def draw(model, wanted):
    """A model and Settings → Drawn, by the first stage, and the frames for the second. Raises UserError."""
    if isinstance(model, Baseline):
        return model.draw(wanted), []
    frames = settings.frames_of(model, wanted)
    return settings.draw_small(model, wanted, frames), frames


def within(value, least, most):
    """What the page sends as a number, which may be anything, as one within these bounds."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    return min(max(number, least), most) if math.isfinite(number) else least


def labelled_slider(text, least, most, step, value, on_change):
    with ui.column().classes("w-full gap-0"):
        ui.label(text).classes("text-caption")
        return ui.slider(min=least, max=most, step=step, value=value, on_change=on_change).props("label")


def text_of(control):
    return str(control.value or "")[:MOST_TEXT].strip()


async def drawing(function, *arguments):
    """Calls a function where pictures are drawn, while the page goes on."""
    return await asyncio.get_running_loop().run_in_executor(DRAWING, function, *arguments)


# ----------------------------------------------------------------------------------------------------------------------
# The page.


class Page:
    """What one visitor sees and has set. A control that changes draws again, and the newest settings win."""

    def __init__(self, models, checkpoints, prompt):
        self.models = models  # path → model, each loaded once
        self.model = self.drawn = self.sheet = self.shown = None  # shown: the Settings of what is drawn
        self.frames = []  # of what is drawn, for the second stage
        self.centre = self.forced = self.point = None  # point: sheet.Point, the one that was clicked
        self.walked = 0.0
        self.busy = self.again = False
        ui.dark_mode(None)  # as the visitor's system
        ui.add_css(CSS)
        ui.button.default_props("no-caps")
        ui.keyboard(on_key=self.press)
        with ui.element("main").classes("page"):
            with ui.column().classes("w-full gap-3"):
                self.add_prompt(prompt)
                self.image = ui.interactive_image(on_mouse=self.click).classes("sheet").mark("pictures")
                self.told = ui.label().mark("told")
            with ui.column().classes("w-full gap-3"):
                self.add_noise(checkpoints)
                with ui.expansion("A second prompt", value=True).classes("w-full"):
                    self.add_second_prompt()
                with ui.expansion("Experts", value=True).classes("w-full"):
                    self.add_experts()
        ui.timer(0, self.refresh, once=True)

    def add_prompt(self, prompt):
        self.prompt = ui.input("Prompt", value=prompt, on_change=self.refresh).props(TYPING).classes("w-full text-xl")
        with ui.row().classes("gap-1"):
            for example in EXAMPLES:
                choose = functools.partial(self.prompt.set_value, example)
                ui.button(example, on_click=choose).props("outline rounded dense size=sm").classes("px-3")
        self.note = ui.label().classes("text-orange-8").mark("note")

    def add_noise(self, checkpoints):
        names = {path: os.path.relpath(path) for path in checkpoints}
        self.checkpoint = ui.select(names, value=checkpoints[0], label="Model", on_change=self.refresh)
        self.checkpoint.classes("w-full").set_visibility(len(names) > 1)
        with ui.row().classes("w-full items-center no-wrap"):
            self.seed = ui.number("Seed", value=0, min=0, precision=0, on_change=self.reseed).classes("grow")
            self.walking = ui.timer(WALK_EVERY, self.walk, active=False)
            self.walk_button = ui.button("Walk", on_click=self.start_or_stop)
        self.num = labelled_slider("Pictures", 1, settings.MOST, 1, 4, self.renumber)
        self.psi = labelled_slider("Truncation ψ", 0, MOST_PSI, 0.05, 1, self.refresh)
        with ui.row():
            self.like_button = ui.button("More like this", on_click=self.more_like_this).props("outline")
            self.all_button = ui.button("All again", on_click=self.all_again).props("flat")
        ui.label("Keys: N next seed, P previous, W walk").classes("text-caption")

    def add_second_prompt(self):
        self.second = ui.input("Second prompt", on_change=self.refresh).props(TYPING).classes("w-full")
        self.amount = labelled_slider("From the first to the second", 0, 1, 0.01, 0, self.refresh)
        self.part = ui.select(PARTS, value="both", label="What moves", on_change=self.refresh).classes("w-full")
        self.layers = ui.select({}, value=[], multiple=True, on_change=self.refresh).classes("w-full")
        self.layers.props('label="Layers by the second prompt, coarse to fine" use-chips')

    def add_experts(self):
        self.router = ui.select([NO_ROUTER], value=NO_ROUTER, label="Router", on_change=self.reroute).classes("w-full")
        self.legend = ui.row().classes("items-center gap-1")
        with ui.column().classes("w-full gap-2") as self.forcing:
            self.scope = ui.select(SCOPES, value="all", label="Give", on_change=self.mark).classes("w-full")
            ui.label("to expert")
            self.takers = ui.row().classes("gap-1")
            ui.button("Release", on_click=self.release).props("flat")
        self.forcing.set_visibility(False)

    async def press(self, event):
        """A key that is not meant for a field; arrows move the sliders."""
        if not event.action.keydown:
            return
        if event.key in ("n", "p"):
            step = 1 if event.key == "n" else -1
            self.seed.value = int(within((self.seed.value or 0) + step, 0, 2**53))
        elif event.key == "w" and self.walk_button.enabled:
            self.start_or_stop()

    # What is drawn.

    def wanted(self):
        return Settings(
            prompt=text_of(self.prompt),
            seed=int(within(self.seed.value, 0, 2**53)),
            num=int(within(self.num.value, 1, settings.MOST)),
            psi=within(self.psi.value, 0, MOST_PSI),
            second=text_of(self.second),
            amount=within(self.amount.value, 0, 1),
            part=self.part.value,
            layers=tuple(self.layers.value),
            walk=self.walked,
            centre=self.centre,
            forced=self.forced,
        )

    async def refresh(self):
        """Draws what is wanted; while that takes, later changes are remembered, and drawn once."""
        self.again = True
        if self.busy:
            return
        self.busy = True
        try:
            while self.again:
                self.again = False
                try:
                    await self.redraw()
                    await self.enlarge()
                except Exception as error:  # whatever it is, the page says it, and draws again
                    self.note.text = first_line(error)
        finally:
            self.busy = False

    async def redraw(self):
        self.frames = []
        model = await drawing(self.models, self.checkpoint.value)
        if model is not self.model:
            self.offer(model)
        wanted = self.wanted()
        self.drawn, self.frames = await drawing(draw, model, wanted)
        if self.point and self.point.picture >= wanted.num:  # clicked while fewer were drawn
            self.point = None
        prompts = [wanted.prompt, *[wanted.second] * bool(wanted.second)]
        self.note.text = " ".join(remark + "." for prompt in prompts for remark in latent.remarks(model.clip, prompt))
        self.shown = wanted
        self.show()

    def show(self):
        self.sheet = Sheet(self.shown.num, self.drawn.images.shape[-1])
        self.image.style(f"width: min(100%, {self.sheet.columns * CELL}px)")
        self.image.set_source(self.sheet.joined(self.drawn.pictures))
        self.mark()

    async def enlarge(self):
        """Once nothing has changed for a while, the second stage draws: one picture after another, so that a change
        waits for no more than one.
        """
        upsampler = getattr(self.model, "upsampler", None)
        if upsampler is None or not self.frames:
            return
        small, rest_until = self.drawn, time.monotonic() + REST
        while time.monotonic() < rest_until and not self.again:
            await asyncio.sleep(REST / 10)
        large = []
        for i, frame in enumerate(self.frames):
            if self.again:
                return
            one = Drawn(small.images[i : i + 1], [frame.caption], {})
            large.append((await drawing(pipeline.enlarge, upsampler, one, [frame])).images)
        self.drawn = dataclasses.replace(small, images=torch.cat(large))
        self.show()

    def offer(self, model):
        """Offers what this model has."""
        self.model, is_aurora = model, isinstance(model, Pipeline)
        if self.walking.active:
            self.start_or_stop()
        self.centre = self.forced = self.point = None
        stages = [model.generator, model.upsampler] if is_aurora else []
        names = [name for stage in stages if stage for name in views.layer_names(stage)]
        self.layers.set_options(dict(enumerate(names)), value=[])
        known = routers(model.generator) if is_aurora else []
        self.router.set_options([NO_ROUTER, *known], value=NO_ROUTER)
        auroras = (self.second, self.amount, self.part, self.layers, self.psi, self.router)
        for control in (*auroras, self.walk_button, self.like_button, self.all_button):
            control.set_enabled(is_aurora)
        self.told.text = "" if is_aurora else f"{model.name} takes a prompt, a seed and a number; the rest is Aurora's."

    # Noise.

    async def reseed(self):
        self.walked = 0.0
        await self.refresh()

    async def renumber(self):
        self.forced = self.point = None
        await self.refresh()

    async def walk(self):
        self.walked += WALK_STEP
        await self.refresh()

    def start_or_stop(self):
        self.walking.active = not self.walking.active
        self.walk_button.text = "Stop" if self.walking.active else "Walk"

    def more_like_this(self):
        """The picture that was clicked, and others near it; the next seed says which."""
        if self.point is None:
            self.told.text = "Click a picture first."
            return
        self.centre = settings.codes(self.model.generator, self.shown)[self.point.picture]
        self.forced = self.point = None
        self.seed.value = int(within(self.seed.value, 0, 2**53)) + 1

    async def all_again(self):
        self.centre = None
        await self.refresh()

    # Experts.

    @property
    def routing(self):
        """Of the router that is looked at, or None."""
        return self.drawn.routings.get(self.router.value) if self.drawn else None

    async def reroute(self):
        """Another router is looked at."""
        was_forced = self.forced
        self.point = self.forced = None
        routing = self.routing
        count = routing.logits.shape[-1] if routing else 0
        for row in (self.legend, self.takers):
            row.clear()
        for expert in range(count):
            with self.legend:
                ui.badge(str(expert)).style(f"background: {COLORS[expert % len(COLORS)]} !important")
            with self.takers:
                ui.button(str(expert), on_click=functools.partial(self.force, expert)).props("dense")
        self.forcing.set_visibility(bool(count))
        self.told.text = "Click a point." if count else ""
        self.mark()
        if was_forced:
            await self.refresh()

    def click(self, event):
        if self.sheet:
            side = round(self.routing.gate.shape[1] ** 0.5) if self.routing else 1
            self.point = self.sheet.point_at(event.image_x, event.image_y, side)
            self.mark()

    def mark(self):
        """Lays over the pictures who took which point, and what was clicked; tells about it."""
        if self.routing is None:
            self.image.set_content(self.sheet.picked(self.point.picture) if self.sheet and self.point else "")
            return
        index, count = self.routing.expert_index, self.routing.logits.shape[-1]
        if self.point is None:
            self.image.set_content(self.sheet.experts(index, count))
            return
        seen = int(index[self.point])
        overlay = "" if self.forced else self.sheet.experts(index, count, seen)  # nothing hides what was drawn so
        self.image.set_content(overlay + self.sheet.marks(self.marked("point")))
        self.told.text = self.sentence(seen)

    def marked(self, scope):
        """The points [num, N] that a scope means, by the one that was clicked."""
        index, mask = self.routing.expert_index, torch.zeros_like(self.routing.expert_index, dtype=torch.bool)
        if scope == "point":
            mask[self.point] = True
        elif scope == "picture":
            mask[self.point.picture] = index[self.point.picture] == index[self.point]
        else:
            mask = index == index[self.point]
        return mask

    def sentence(self, seen):
        """What is known about the point that was clicked."""
        (picture, at), index = self.point, self.routing.expert_index
        row, column = divmod(at, round(index.shape[1] ** 0.5))
        chances = self.routing.logits[picture, at].softmax(-1).tolist()
        verb = "took" if chances[seen] == max(chances) else "was given"
        others = ", ".join(f"{expert}: {chance:.2f}" for expert, chance in enumerate(chances) if expert != seen)
        shares = 100 * (index[picture] == seen).float().mean(), 100 * (index == seen).float().mean()
        return (
            f"Row {row + 1}, column {column + 1} of picture {picture + 1}: expert {seen} {verb} it, with probability "
            f"{chances[seen]:.2f} ({others}). It has {shares[0]:.0f} % of this picture and {shares[1]:.0f} % of all."
        )

    async def force(self, expert):
        if self.point is None:
            self.told.text = "Click a point first."
            return
        self.forced = Forced(self.router.value, self.marked(self.scope.value), expert)
        await self.refresh()

    async def release(self):
        self.forced = None
        await self.refresh()


# ----------------------------------------------------------------------------------------------------------------------


class KnownHosts:
    """Serves those alone who ask for this machine by its address or by a name of its own: else another site, whose name
    is made to lead here once its page is open, could use this page as if it were its own (DNS rebinding).
    """

    def __init__(self, served, names):
        self.served, self.names = served, {name.lower() for name in names}

    async def __call__(self, scope, receive, send):
        if scope["type"] in ("http", "websocket"):
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
            if name not in self.names and not is_address(name.strip("[]")):
                response = PlainTextResponse("This page is not served under that name; use its address.", 400)
                return await response(scope, receive, send)
        return await self.served(scope, receive, send)


def is_address(name):
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def check_address(host, port):
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} of {host} cannot be served ({first_line(error)}); choose another --port, or --host"
        ) from error


def main():
    args = parse_args()
    with told_in_one_line():
        check_address(args.host, args.port)
        models = functools.cache(functools.partial(load_model, args))
        models(args.checkpoint[0])
        app.add_middleware(KnownHosts, names={"localhost", socket.gethostname(), socket.getfqdn(), args.host})
        print(f"The page is at http://{args.host}:{args.port}; Ctrl-C ends it", flush=True)
        ui.run(
            lambda: Page(models, args.checkpoint, args.prompt),
            host=args.host,
            port=args.port,
            title="Aurora",
            show=False,
            reload=False,
            show_welcome_message=False,
        )


if __name__ == "__main__":
    main()
