"""Serves a page to explore a generator: `python explore.py`, then open the address that it prints.

Prompts and interpolation between them, layers, noise, walks, and which expert takes which point. Only this machine can
open the page, unless --host allows others. It needs no network.
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common.cli import Parser, UserError, a_path, errors_in_one_line, first_line, positive_int
from sampling import inference, page
from sampling.pictures import COLORS
from sampling.pipeline import Pipeline
from weights.generator_file import DEMO

PAGE = Path(__file__).parent / "sampling" / "explore.html"


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("prompt", nargs="?", default="red heart", help="what the page draws first")
    add("--checkpoint", type=a_path, default=DEMO, help="a run, its generator, or the authors' aurora_v1.pth")
    add("--clip", help="MODEL:WEIGHTS of open_clip, to read a large CLIP from a file; default: as in the checkpoint")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *inference.DTYPES), default="auto", help="auto: bf16 for large models, if fast")
    add("--host", default="127.0.0.1", help="the address to serve at; 0.0.0.0 allows other machines")
    add("--port", type=positive_int, default=8080)
    return parser.parse_args(argv)


class Server(ThreadingHTTPServer):
    """Serves the page and draws. It answers one request at a time, because a forced expert changes the model."""

    def __init__(self, args):
        try:
            super().__init__((args.host, args.port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {args.port} of {args.host} is unavailable ({first_line(error)}); choose another --port or --host"
            ) from error
        self.prompt, self.drawing = args.prompt, threading.Lock()
        self.pipe = Pipeline.load(args.checkpoint, args.device, args.dtype, args.clip)

    def answer(self, path, request):
        """The path and content of a request → values of JSON."""
        if path == "/start":
            return {"prompt": self.prompt, "colors": COLORS, **page.contents(self.pipe)}
        settings = page.read_settings(request["settings"])
        with self.drawing:
            if path == "/enlarge":
                return page.data_url(page.draw_large(self.pipe, settings, request["number"]))
            return page.answer(self.pipe, settings, request["router"])


class Handler(BaseHTTPRequestHandler):
    def handle(self):
        with contextlib.suppress(ConnectionError):  # the page was closed
            super().handle()

    def do_GET(self):
        if self.path.partition("?")[0] != "/":
            return self.send_error(404)
        self.reply("text/html; charset=utf-8", PAGE.read_bytes())

    def do_POST(self):
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            result = self.server.answer(self.path, request)
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
        print(f"The page is at http://{args.host}:{args.port}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        server.drawing.acquire()  # PyTorch would abort the process if it ended while a thread draws


if __name__ == "__main__":
    main()
