"""Chromium without a window, driven over the WebDriver protocol: JSON over HTTP, so no library is needed."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "no chromium with its chromedriver is here"


class Browser:
    """One page after another in one window; `with Browser() as browser`."""

    def __init__(self, width=1400, height=1000):
        self.size = f"--window-size={width},{height}"

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.driver = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                if self.ask("GET", "/status")["ready"]:
                    break
            except urllib.error.URLError:
                time.sleep(0.1)
        options = {"binary": CHROMIUM, "args": ["--headless=new", "--no-sandbox", "--disable-gpu", self.size]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.url += f"/session/{made['sessionId']}"
        return self

    def __exit__(self, *_):
        try:
            self.ask("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, file):
        """Load a file; returns when it is there."""
        self.ask("POST", "/url", {"url": file.as_uri()})

    def run(self, script):
        """The value of the body of a JavaScript function."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def console(self):
        """What the page wrote to the console since last asked, errors of scripts and of loading among it."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, file):
        """What is seen, as a PNG."""
        file.write_bytes(base64.b64decode(self.ask("GET", "/screenshot")))
