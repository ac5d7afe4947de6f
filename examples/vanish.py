"""Where a peer can vanish without a word: vanish() and a command around it.
Beside it, what else may happen to a connection; facts.py uses that.

    python3 examples/vanish.py               says whether it can be had here
    unshare -Urnm python3 examples/vanish.py COMMAND...

Root may have the kernel do that.  Anybody else may in a network of their own,
made by unshare, in which they count as root.  It has no interface but
loopback, and nothing of it is left when the command has ended.
"""

if __name__ == "__main__":
    import quiet  # before the rest: it may be interrupted there

import atexit
import os
import select
import socket
import struct
import subprocess
import sys

TCP = socket.IPPROTO_TCP


def wait(sock, events=1, seconds=3):
    """Wait until a socket can be read or fails, or for other events."""
    poll = select.poll()
    poll.register(sock, events)  # POLLIN is 1, POLLRDHUP 0x2000
    poll.poll(1000 * seconds)


def pair(data=b"", end=None, answer=b""):
    """Return a socket and its peer, which has sent data, then a FIN or RST.

    The socket has then answered.  The peer's window is small, and soon shut.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock = socket.create_connection(server.getsockname())
        peer = server.accept()[0]
    atexit.register(sock.close)
    atexit.register(peer.close)
    peer.send(data)
    # close() sends an RST, and no FIN, if it may linger but for 0 s.
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                    struct.pack("ii", end == "RST", 0))
    if end:
        peer.close()
        wait(sock, 0x2000)
    if answer:
        sock.send(answer)
        wait(sock, 0)  # for an RST
    return sock, peer


def full_backlog():
    """Return a listener with a full backlog, a socket that is connecting to
    it, and one that is not.
    """
    server = socket.create_server(("127.0.0.1", 0), backlog=0)
    atexit.register(server.close)
    for _ in range(4):
        sock = socket.socket()
        atexit.register(sock.close)
        sock.setblocking(False)
        sock.connect_ex(server.getsockname())
    fresh = socket.socket()
    atexit.register(fresh.close)
    return server, sock, fresh


def unreachable(sock):
    """Send a socket the ICMP error that its peer's host is unreachable."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW,
                       socket.IPPROTO_ICMP) as raw:
        sock.setsockopt(TCP, 19, 1)   # TCP_REPAIR: on
        sock.setsockopt(TCP, 20, 2)   # TCP_REPAIR_QUEUE: TCP_SEND_QUEUE
        sequence = sock.getsockopt(TCP, 21) % 2 ** 32  # TCP_QUEUE_SEQ
        sock.setsockopt(TCP, 19, -1)  # TCP_REPAIR: off, and nothing is sent
        host, port = sock.getsockname()
        other, its_port = sock.getpeername()
        # The start of the segment that the error is about: IP, then TCP.
        segment = struct.pack(
            "!B8xB2x4s4sHHI", 0x45, TCP, socket.inet_aton(host),
            socket.inet_aton(other), port, its_port, sequence)
        total = 0x0301 + sum(struct.unpack("!14H", segment))
        raw.sendto(struct.pack("!BBH4x", 3, 1, 0xffff - total % 0xffff)
                   + segment, (host, 0))
        wait(raw)


def vanish(sock):
    """Have the kernel drop whatever comes in for this socket."""
    import ctypes  # which not every Python has
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack(  # SO_ATTACH_FILTER
        "HP", 1, ctypes.addressof(drop)))


def where():
    """Return the words to put before a command so that its peers can vanish:
    none for root.  OSError says why it cannot be had here.
    """
    try:
        with socket.socket() as sock:
            vanish(sock)
        return []
    except PermissionError:
        words = ["unshare", "-Urnm", sys.executable, os.path.abspath(__file__)]
        done = subprocess.run([*words, "true"], capture_output=True, text=True)
        if done.returncode:
            raise PermissionError(done.stderr.strip().rpartition("\n")[2])
        return words


def go_there():
    """Start this program anew where peers can vanish, unless that is here.

    OSError says why there is no such place.
    """
    words = where()
    if words:
        os.execvp(words[0], [*words, sys.executable, *sys.argv])


def enter():
    """Make a new network usable: loopback, and a /run for ip netns."""
    import ctypes
    import fcntl  # Windows has none
    with socket.socket() as sock:
        up = struct.pack("16sh22x", b"lo", 1)
        fcntl.ioctl(sock, 0x8914, up)  # SIOCSIFFLAGS
        vanish(sock)
    ctypes.CDLL(None).mount(b"tmpfs", b"/run", b"tmpfs", 0, None)


def main():
    """Run a command; without one, say whether it would do."""
    command = sys.argv[1:]
    about = command[0] if command else "no peer can vanish here"
    try:
        if command:
            enter()
            os.execvp(about, command)
        print("in a network of one's own" if where() else "as it is")
    except OSError as error:
        sys.exit(f"vanish.py: {about}: {error.strerror or error}")


if __name__ == "__main__":
    main()
