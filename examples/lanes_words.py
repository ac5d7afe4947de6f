"""The words of lanes.py: what one end of a connection can know, and no more.

The page shows them beside a real connection, so each must be true in every
order in which the buttons can be pressed; test_tcpops.py presses them.
"""

import tcpops

REFUSED = "refused" if "refused" in tcpops.REASONS else "reset"

#: One sentence for each of tcpops.REASONS, and for a refused connect.
LESSONS = {
    "eof": "The peer sent FIN, no more bytes from me: a close, a half-close"
           " and a killed program all look the same.",
    "closed": "We closed it by its number.",
    "protocol": "The bytes that came are no message that we accept, and where"
                " the next one begins no one can say.",
    "error": "The socket failed, and not in a way that a peer brings about.",
    "shutdown": "Our program ended, and every connection with it.",
    "reset": "The peer sent RST: what had arrived before it was delivered,"
             " and what was on its way to the peer is lost.",
    "refused": "The host answered our SYN with RST: it is there, but no"
               " program listens on that port.",
    "keepalive": "The peer, or the way to it, is gone, and that makes no"
                 " sound: we know because we asked, and no answer came.",
    "lifetime": "No byte moved for as long as we allow: a peer with nothing"
                " to say, or one that is gone, for both look the same.",
    "connect": "No answer came to our SYN: a firewall that drops it and a"
               " host without power look the same, so we stop waiting.",
    "send": "Our queue stood still for too long: the peer's program does not"
            " read, or the peer is gone, and from here both look the same.",
    "message": "A message began and was not complete in time; a byte now and"
               " then does not help, or one slow peer could hold us for ever.",
}

#: Instead of those, where it is known how many bytes the peer's kernel has
#: not acknowledged: none, or some.
UNSENT = {
    "closed": ("We closed it by its number, and no byte of ours was left"
               " behind; whether our FIN arrived, we are not told.",
               "We closed it, but the peer did not take the queue:"
               " {:,} bytes were never acknowledged, and may be lost."),
    "eof": (LESSONS["eof"],
            "The peer sent FIN, no more bytes from me, and it did not take"
            " ours either: {:,} were never acknowledged."),
}

#: What each State tells.
STATES = {
    "ACCEPT": "accepted, no byte has moved yet",
    "CONNECT": "our SYN has no answer yet",
    "OK": "no end and no error in sight",
    "EOF": "the peer has sent FIN",
    "ERROR": "the socket carries an error",
    "BAD": "the probe itself failed",
    "NOT_FOUND": "gone"}

CLOSING = "closing: {}; the reason can change no more"
UNTOLD = " (not told to a program)"  #: where it has closed it by number
PASSED = "(of the phases passed, those that can be known)"


def lesson(event):
    """Return the sentence for the end that an event reports."""
    if event.reason == REFUSED and not event.opened:
        return LESSONS["refused"]
    if event.opened and event.reason in UNSENT and event.unsent is not None:
        return UNSENT[event.reason][event.unsent > 0].format(event.unsent)
    return LESSONS[event.reason]


def passed(event, probed):
    """Return the phases that no snapshot showed, and that an end proves.

    probed is the State at the last probe: where it was not yet the peer's
    FIN (-2 EOF), no RST can have come behind one, and our end waited for it.
    """
    if not event.opened:
        return []
    if event.reason == "reset":
        return ["reading_rest"]
    if event.reason == "closed":  # our FIN goes when our queue is empty
        lingers = event.queued == 0 and probed > 0
        return ["sending_rest", *["lingering"] * lingers]
    if event.reason == "eof" and event.unsent == 0 and probed > 0:
        return ["sending_rest"]
    return []
