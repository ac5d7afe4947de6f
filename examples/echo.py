"""The smallest server: each connection gets a conid, its bytes come back.

    python3 examples/echo.py [--slow]
    python3 examples/echo.py --listen 127.0.0.1:5060    stays up; then try
    nc 127.0.0.1 5060

Prints:
    conid 2 is open
    conid 2 says b'hello'
    the client got b'hello'
    conid 2 ended: eof after 5 bytes in, 5 out
"""

from slow import options, soon  # first: it finds tcpops.py, too

import contextlib
import socket
import sys

import tcpops

ops = tcpops.TcpOps()


@ops.request_route
def echo(msg):
    print(f"conid {msg.conid} says {msg.data}")
    msg.reply(msg.data)


@ops.event_route("tcp:opened")
def opened(event):
    print(f"conid {event.conid} is open")


@ops.event_route("tcp:closed")
def closed(event):
    print(f"conid {event.conid} ended: {event.reason} after"
          f" {event.bytes_in} bytes in, {event.bytes_out} out")
    if not options.listen:
        ops.stop()


listener = ops.connection(ops.listen(*(options.listen or ("127.0.0.1", 0))))
if options.listen:
    print(f"listening on {listener.Ri}:{listener.Rp}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        ops.run()
    ops.drain(1)
    sys.exit()
client = socket.create_connection((listener.Ri, listener.Rp))
soon("the client says hello")
client.sendall(b"hello")
while ops.stats()["bytes_out"] < 5:
    ops.step(timeout=1)
print("the client got", client.recv(100))
soon("the client closes")
client.close()
ops.run()  # until closed() stops it
ops.close()
