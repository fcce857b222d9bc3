"""An HTTP server of a folder that answers range requests and tells ETags, and counts what it was asked."""

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class FolderServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, tells: tuple[str, ...]):
        self.folder = folder
        self.tells = tells  # of ETag and Last-Modified
        self.asked: Counter = Counter()  # (method, path)
        self.sent = 0  # bytes of content
        self.broken: set[str] = set()  # paths that are answered with 503
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(SimpleHTTPRequestHandler):
    server: FolderServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, with_content: bool) -> None:
        self.server.asked[self.command, self.path] += 1
        path = self.server.folder / unquote(self.path).lstrip("/")
        if self.path in self.server.broken or not path.exists():
            self.send_response(503 if self.path in self.server.broken else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path.is_dir():
            names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
            content = "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode()
        else:
            content = path.read_bytes()
        whole = len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, end = int(wanted[1]), int(wanted[2] or whole - 1)
            content = content[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{whole}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", "text/html" if path.is_dir() else "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if "ETag" in self.server.tells and path.is_file():
            self.send_header("ETag", f'"{hashlib.md5(path.read_bytes()).hexdigest()}"')
        if "Last-Modified" in self.server.tells and path.is_file():
            self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        if with_content:
            self.server.sent += len(content)
            self.wfile.write(content)


@contextmanager
def serve(folder: Path, tells: tuple[str, ...] = ("ETag", "Last-Modified")) -> Iterator[FolderServer]:
    server = FolderServer(folder, tells)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
