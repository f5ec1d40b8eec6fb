# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A headless Chromium that a test drives, by its DevTools protocol over pipes: no package is needed besides it."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser():
    """Path of a Chromium or Chrome, or None."""
    chosen = os.environ.get("PYRO_APD_BROWSER")
    return chosen or next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page in a browser.

    :ivar list messages: what the console got: warnings, errors, and exceptions of the page.
    :ivar list requests: addresses that the page asked for.
    """

    def __init__(self, folder, timeout=120):
        self._timeout, self._number, self._inbox = timeout, 0, b""
        self.messages, self.requests, self._events = [], [], []
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()
        command = [
            *(find_browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
            *("--no-first-run", "--disable-extensions", "--disable-dev-shm-usage", f"--user-data-dir={folder}"),
            "about:blank",
        ]
        # The browser reads commands from its file 3 and writes to its file 4.
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", script, "bash", *command],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read), os.close(to_write)
        target = next(t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._out), os.close(self._in)

    def _call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self._timeout
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self, deadline):
        while b"\0" not in self._inbox:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise TimeoutError("The browser does not answer.")
            self._inbox += os.read(self._in, 2**20)
        text, _, self._inbox = self._inbox.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event, details):
        if event == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.messages.append(" ".join(str(part.get("value", part)) for part in details["args"]))
        elif event == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(details["exceptionDetails"])[:500])
        elif event == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.messages.append(details["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])

    def open(self, url, width=1400, height=1000, scheme="light"):
        """Loads an address in a window of that size and colour scheme."""
        self.resize(width, height, scheme)
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width, height=1000, scheme="light"):
        """Another window."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def value(self, expression):
        """What an expression is in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression):
        """Waits until an expression is true in the page."""
        deadline = time.monotonic() + self._timeout
        while not self.value(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression}; the console has {self.messages}")
            time.sleep(0.1)

    def press(self, key):
        """Presses a key of the keyboard, ``"ArrowRight"`` or ``" "``."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code="Space" if key == " " else key)

    def drag(self, selector, places):
        """Draws on an element with the pointer, from place to place: shares of its width and height."""
        box = self.value(f"JSON.parse(JSON.stringify(document.querySelector('{selector}').getBoundingClientRect()))")
        points = [(box["x"] + a * box["width"], box["y"] + b * box["height"]) for a, b in places]
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 2), "mouseReleased"]
        for kind, (x, y) in zip(kinds, points, strict=True):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def click(self, selector):
        """Clicks in the middle of an element."""
        self.value(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
        self.drag(selector, [(0.5, 0.5), (0.5, 0.5)])

    def picture(self, path):
        """Writes a picture of the whole page."""
        height = int(self.value("document.documentElement.scrollHeight"))
        width = int(self.value("window.innerWidth"))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        answer = self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))
