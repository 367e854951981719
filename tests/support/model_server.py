"""An OpenAI-compatible server of a tiny model in a process of its own: `python model_server.py MODEL PORT`.

It answers as `sampo generate` does in its own process, so both ways can be compared to the bit. It takes a second to
start, as real servers do.
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from types import SimpleNamespace

from sampo.evaluation.answers.backends import TransformersBackend
from sampo.evaluation.answers.generate import Sampling
from sampo.evaluation.texts import Texts
from sampo.models.inference import load_causal
from sampo.models.load import load_tokenizer


def main(model: str, port: int) -> None:
    texts = Texts(load_tokenizer(model), "auto")
    backend, lock = TransformersBackend(model, load_causal(model), texts), Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"object": "list", "data": [{"id": model, "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            names = ("max_tokens", "temperature", "top_p", "top_k")
            sampling = Sampling(**{name: body[name] for name in names if name in body})
            prompt = texts.prompt(body["messages"])
            job = SimpleNamespace(seed=lambda _: body.get("seed", 0))
            with lock:
                ((_, output),) = backend.answer([(prompt, job)], sampling)
            choice = {"message": {"role": "assistant", "content": output.text}, "index": 0}
            choice["finish_reason"] = "stop" if output.stop == "eos" else "length"
            usage = {"prompt_tokens": len(prompt), "completion_tokens": output.tokens}
            self.answer({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})

        def answer(self, body):
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    time.sleep(1)
    print(f"serving {model}", flush=True)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
