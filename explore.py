"""Serves a page to explore a generator: `python explore.py`, then open the address that it prints.

Prompts and interpolation between them, layers, noise, walks, and which expert takes which point. Only this machine can
open the page, unless --host allows others. It needs no network.
"""

import contextlib
import functools
import json
import os
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from baselines import shared
from common import distributed
from common.cli import Parser, UserError, a_path, errors_in_one_line, first_line, positive_int
from sampling import inference, page
from sampling.pictures import COLORS
from sampling.pipeline import Pipeline
from weights.generator_file import DEMO, generator_of

PAGE = Path(__file__).parent / "sampling" / "explore.html"
MAX_BYTES = 2**22  # of a request
REQUESTS = ("/start", "/draw", "/enlarge")


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("prompt", nargs="?", default="red heart", help="what the page draws first")
    models = "models to choose from: runs, also of baselines, generator_ema.safetensors, or the authors' aurora_v1.pth"
    add("--checkpoint", type=a_path, nargs="+", action="extend", help=models)
    add("--clip", help="MODEL:WEIGHTS of open_clip, to read a large CLIP from a file; default: as in the checkpoint")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *inference.DTYPES), default="auto", help="auto: bf16 for large models, if fast")
    add("--host", default="127.0.0.1", help="the address to serve at; 0.0.0.0 allows other machines")
    add("--port", type=positive_int, default=8080)
    args = parser.parse_args(argv)
    args.checkpoint = args.checkpoint or [DEMO]
    return args


def load_model(args, number):
    """One of args.checkpoint → a Pipeline, or a system of baselines/. Raises UserError."""
    path = generator_of(args.checkpoint[number])
    if system_class := shared.system_of(path):
        system, _ = shared.load(system_class, path, distributed.start(args.device))
        return system
    return Pipeline.load(path, args.device, args.dtype, args.clip)


class Server(ThreadingHTTPServer):
    """Serves the page and draws. It answers one request at a time, because a forced expert changes the model."""

    def __init__(self, args):
        try:
            super().__init__((args.host, args.port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {args.port} of {args.host} is unavailable ({first_line(error)}); choose another --port or --host"
            ) from error
        self.args, self.drawing = args, threading.Lock()
        self.model = functools.cache(functools.partial(load_model, args))
        self.names = {name.lower() for name in ("localhost", socket.gethostname(), socket.getfqdn(), args.host)}

    def answer(self, path, request):
        """The path and content of a request → values of JSON."""
        if path == "/start":
            models = [os.path.relpath(checkpoint) for checkpoint in self.args.checkpoint]
            return {"prompt": self.args.prompt, "models": models, "colors": COLORS}
        with self.drawing:
            model, settings = self.model(request["model"]), page.read_settings(request["settings"])
            if path == "/enlarge":
                return page.data_url(page.draw_large(model, settings, request["number"]))
            return page.answer(model, settings, request["router"])


class Handler(BaseHTTPRequestHandler):
    def handle(self):
        with contextlib.suppress(ConnectionError):  # the page was closed
            super().handle()

    def parse_request(self):
        """Refuses a Host that is not a name of this machine. Otherwise a foreign site could read this page by pointing
        its own name at this machine's address (DNS rebinding).
        """
        if not super().parse_request():
            return False
        host = self.headers.get("Host", "").lower()
        name = re.sub(r":\d*$", "", host)
        is_address = re.fullmatch(r"[\d.]+|\[[\da-f:.]+\]", name)  # such as [::1]
        if name in self.server.names or is_address:
            return True
        self.send_error(400, "This page is not served under that name; open it by its address.")
        return False

    def do_GET(self):
        if self.path.partition("?")[0] != "/":
            return self.send_error(404)
        self.reply("text/html; charset=utf-8", PAGE.read_bytes())

    def do_POST(self):
        if self.path not in REQUESTS:
            return self.send_error(404)
        try:
            if not 0 <= (length := int(self.headers["Content-Length"])) <= MAX_BYTES:
                raise UserError("the request is too long")
            result = self.server.answer(self.path, json.loads(self.rfile.read(length)))
        except Exception as error:  # of any kind: the page shows it and can draw again
            advice = "" if isinstance(error, UserError) else "; reload the page"
            result = {"error": first_line(error) + advice}
        self.reply("application/json", json.dumps(result).encode())

    def reply(self, kind, content):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Prints nothing, instead of a line for each picture."""


def main():
    args = parse_args()
    with errors_in_one_line(), Server(args) as server:
        for path in args.checkpoint:
            generator_of(path)
        server.model(0)
        print(f"The page is at http://{args.host}:{args.port}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        server.drawing.acquire()  # PyTorch would abort the process if it ended while a thread draws


if __name__ == "__main__":
    main()
