"""How lanes.py gives its page to a browser: as much HTTP as that takes."""

import re
from pathlib import Path

import tcpops

PAGE = Path(__file__).with_name("lanes.html")
NAMES = ("127.0.0.1", "localhost")  #: in Host and Origin


class PageFraming(tcpops.Framing):
    """A message is the head of an HTTP request; what is sent goes as it is."""

    longest = 8192

    def next_message(self):
        end = self.buffer.find(b"\r\n\r\n")
        if max(end, len(self.buffer) if end < 0 else 0) > self.longest:
            raise tcpops.ProtocolError(f"a head of over {self.longest} bytes")
        if end < 0:
            return None
        head = bytes(self.buffer[:end])
        self.buffer.clear()  # one request for each connection
        return head

    def encode(self, payload):
        return payload


def answer(head, port, feed):
    """Return the answer to a request for the page; both ports are ours."""
    lines = head.decode("latin-1").split("\r\n")
    request = re.fullmatch(r"([A-Z]+) (\S+) HTTP/1\.[01]", lines[0])
    hosts = [line.partition(":")[2].strip() for line in lines
             if line.lower().startswith("host:")]
    status, kind, body = "200 OK", "html", ""
    if not request:
        status = "400 Bad Request"
    elif len(hosts) != 1 or hosts[0] not in [f"{n}:{port}" for n in NAMES]:
        status = "403 Forbidden"  # a name of theirs may lead to 127.0.0.1
    elif request[1] not in ("GET", "HEAD"):
        status = "405 Method Not Allowed"
    elif request[2] != "/":
        status = "404 Not Found"
    else:
        body = PAGE.read_text(encoding="utf-8").replace("FEED", str(feed))
    if not body:
        kind, body = "plain", status + "\n"
    feeds = " ".join(f"ws://{name}:{feed}" for name in NAMES)
    data = body.encode()
    headers = [
        f"HTTP/1.1 {status}", f"Content-Type: text/{kind}; charset=utf-8",
        f"Content-Length: {len(data)}", "Allow: GET, HEAD",
        "Cache-Control: no-store", "X-Content-Type-Options: nosniff",
        "Content-Security-Policy: default-src 'none'; img-src data:;"
        " style-src 'unsafe-inline'; script-src 'unsafe-inline';"
        f" connect-src {feeds}; frame-ancestors 'none'; base-uri 'none';"
        " form-action 'none'", "Connection: close", "", ""]
    bare = request and request[1] == "HEAD"
    return "\r\n".join(headers).encode() + (b"" if bare else data)
