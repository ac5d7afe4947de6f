"""Echo over TLS: ends that must not be taken for each other.

    python3 examples/tls_echo.py [--slow]
    python3 examples/tls_echo.py --listen 127.0.0.1:5061
        stays up; then try, in another terminal:
        openssl s_client -quiet -CAfile examples/localhost.pem \
            -connect localhost:5061

Prints:
    b'hello' came back over tls
    close_notify: eof (close_notify from the peer)
    only a FIN: protocol (TLS truncated: FIN without close_notify)
    plain text: protocol (TLS handshake failed: http request \
(plain text on a TLS port?))
"""

from slow import options, soon  # first: it finds tcpops.py, too

import contextlib
import socket
import ssl
import sys
import threading
from pathlib import Path

import tcpops


certificate = str(Path(__file__).with_name("localhost.pem"))  # only for here
server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
server_side.load_cert_chain(certificate)
client_side = ssl.create_default_context(cafile=certificate)

ops = tcpops.TcpOps()
ops.request_route(lambda msg: msg.reply(msg.data))


@ops.event_route("tcp:closed")
def closed(event):
    print(f"{clients.get(event.sp, event.sp)}: {event.reason}"
          f" ({event.detail})", flush=True)


def client(how):
    """An ordinary client, with blocking sockets, in a thread."""
    sock = socket.create_connection(address)
    clients[sock.getsockname()[1]] = how
    try:
        if how == "plain text":
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        else:
            sock = client_side.wrap_socket(sock, server_hostname="localhost")
            sock.sendall(b"hello")
            data = sock.recv(100)
            if how == "close_notify":
                print(data, "came back over tls")
                sock = sock.unwrap()
    finally:  # print() may have failed
        sock.close()


clients = {}
listener = ops.connection(ops.listen(
    *(options.listen or ("127.0.0.1", 0)),
    tls=server_side))
address = listener.Ri, listener.Rp
if options.listen:
    print("listening on %s:%d" % address, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        ops.run()
    ops.drain(1)
    sys.exit()
for number, how in enumerate(("close_notify", "only a FIN", "plain text")):
    soon(f"a client comes: {how}")
    thread = threading.Thread(target=client, args=(how,))
    thread.start()
    while sum(ops.stats()["ended"].values()) <= number:
        ops.step()
    thread.join()
ops.close()
