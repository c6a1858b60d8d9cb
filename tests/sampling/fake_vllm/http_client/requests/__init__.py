"""As much of requests as TRL's VLLMClient uses, over http.client; for where it is not installed."""

import http.client
import json as coder
import types
import urllib.parse


class RequestException(OSError):
    pass


ConnectionError = RequestException
exceptions = types.SimpleNamespace(RequestException=RequestException)


def send(method, url, json=None, params=None):
    parts = urllib.parse.urlsplit(url)
    path = parts.path + ("?" + urllib.parse.urlencode(params) if params else "")
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        body = None if json is None else coder.dumps(json)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        got = connection.getresponse()
        text = got.read().decode()
    except OSError as error:
        raise RequestException(str(error)) from error
    finally:
        connection.close()
    return types.SimpleNamespace(
        status_code=got.status, headers=dict(got.headers), text=text,
        json=lambda: coder.loads(text),
    )


def get(url, **given):
    return send("GET", url, **given)


class Session:
    get = staticmethod(get)

    def post(self, url, **given):
        return send("POST", url, **given)

    def mount(self, prefix, adapter):
        pass
