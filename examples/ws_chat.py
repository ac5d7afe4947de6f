"""A chat over WebSocket, served to a browser.

    python3 examples/ws_chat.py [--slow]
    python3 examples/ws_chat.py --listen 127.0.0.1:8080
        stays up; open http://127.0.0.1:8080 in two browsers.  With
        0.0.0.0:8080 it is open to other machines, too: there by an address
        of this one

Prints:
    the page: HTTP/1.1 200 OK
    ann hears: 3 joined
    ann hears: 4 joined
    bob hears: 4 joined
    ann hears: 4: hello
    bob hears: 4: hello
    ann hears: 4 left (close frame 1000)
"""

from slow import options, soon  # first: it finds tcpops.py, too

import contextlib
import select
import socket
import sys

import tcpops

PAGE = """<!DOCTYPE html>
<meta charset="utf-8">
<title>Chat</title>
<form id="form">
  <input id="said" autofocus autocomplete="off">
</form>
<pre id="heard"></pre>
<script>
  // The host that this page came from: it may have many names.
  const ws = new WebSocket("ws://" + location.host);
  const show = text => heard.textContent += text + "\\n";
  ws.onopen = () => show("you are in");
  ws.onmessage = event => show(event.data);
  ws.onclose = event => show("closed, code " + event.code);
  form.onsubmit = () => {
    ws.send(said.value);
    said.value = "";
    return false;
  };
</script>
</html>
"""
ops = tcpops.TcpOps(connection_lifetime=3600)
present = set()  # conids


class Chat(tcpops.WebSocketFraming):
    """A WebSocket; a request that asks for none gets the page."""

    def refuse(self, path, headers):
        if "upgrade" in dict(headers):
            return None
        return 200, [("Content-Type", "text/html; charset=utf-8")], PAGE


def tell_all(text):
    """Send to whoever is in; who does not read in time is left out."""
    for conid in present:
        ops.send(conid, text)


@ops.request_route
def on_message(msg):
    if msg.text is not None:
        tell_all(f"{msg.conid}: {msg.text}")


@ops.event_route("tcp:opened")
def joined(event):
    present.add(event.conid)
    tell_all(f"{event.conid} joined")


def left(event):
    if event.conid in present:  # it did not only get the page
        present.remove(event.conid)
        tell_all(f"{event.conid} left ({event.detail})")


for name in ("tcp:closed", "tcp:reset", "tcp:timeout"):
    ops.event_route(name)(left)

chat = ops.connection(ops.listen(
    *(options.listen or ("127.0.0.1", 0)), framing=Chat))
if options.listen:
    # A wildcard address is none to open.
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(chat.Ri, chat.Ri)
    print(f"open http://{tcpops.format_address(here, chat.Rp)}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        ops.run()
    present.clear()  # all leave: no one is told of the others
    ops.drain(1)
    sys.exit()

friends = tcpops.TcpOps()  # another program, as it were
names, heard = {}, []


@friends.onreply_route
def hears(msg):
    heard.append(f"{names[msg.conid]} hears: {msg.text}")


def wait_for(count):
    while len(heard) < count:
        ops.step(0.01)
        friends.step(0.01)
    print("\n".join(sorted(heard)))
    heard.clear()


soon("a browser asks for the page")
browser = socket.create_connection((chat.Ri, chat.Rp))
browser.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
while not select.select([browser], [], [], 0)[0]:
    ops.step()
print("the page:", browser.recv(15).decode())
browser.close()
for count, name in enumerate(("ann", "bob"), 1):
    soon(f"{name} comes in")
    conid = friends.connect(chat.Ri, chat.Rp, framing="ws")
    names[conid] = name
    wait_for(count)
soon("bob says hello")
friends.send(conid, "hello")
wait_for(2)
soon("bob leaves")
friends.tcp_close_connection(conid)
wait_for(1)
friends.close()
ops.close()
