"""A shorter file: tcpops.py without the sections that you do not need.

    python3 examples/cut.py sip ws tls cli > small.py

Four sections can be left out, in any choice: sip, ws (WebSocket), tls and cli
(the command line).  The rest works as before, and a framing that was cut out
is a ValueError.  The sections keep their numbers.
"""

import quiet  # before the rest: it may be interrupted there

import argparse
import re
from pathlib import Path

TITLES = {"sip": "SIP over a stream", "ws": "WebSocket", "tls": "TLS",
          "cli": "The command line"}

parser = argparse.ArgumentParser(
    description="Print tcpops.py without some of its sections.")
parser.add_argument("leaf", nargs="+", choices=TITLES, help="a section")
parser.error = lambda message: parser.exit(2, f"cut.py: {message}\n")
leaves = parser.parse_args().leaf

path = Path(__file__).resolve().parent.parent / "tcpops.py"
# A banner follows an empty line, and no other line of dashes does.
sections = re.split(r"(?<=\n\n)(?=# ---)", path.read_text(encoding="utf-8"))
for title in map(TITLES.get, leaves):
    banner = re.compile(rf"# -+\n# \d+\. {title}\n")
    sections = [text for text in sections if not banner.match(text)]
    sections[0] = re.sub(rf" *\d+  {title}(?=  |\n)",
                         lambda entry: " " * len(entry[0]), sections[0])
sections[0] = re.sub(" +\n", "\n", sections[0])
print("".join(sections), end="")
