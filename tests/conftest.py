"""Fixtures that several rooms share. torch and transformers are imported inside them only: the
runtime's tests run where neither is installed."""

from __future__ import annotations

import gc
import http.server
import json
import os
import threading
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch and numpy start their threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile("edge-tcur", deadline=None)  # a busy machine is no defect
hypothesis.settings.load_profile("edge-tcur")

# Files whose tests share bundles that take long to export: in one process, so that each is made once.
SHARED = (
    "test_precision.py", "test_step_graphs.py", "test_export.py", "test_plan.py", "test_export_coupled.py",
    "test_budget_kept.py", "test_reference.py", "test_memory_tables.py", "test_operator_checks.py",
    "test_stream.py", "test_webgpu.py", "test_picks.py", "test_narrow.py", "test_infer_graph.py",
    "test_gemm.py", "test_choices.py",
)  # fmt: skip
# What takes longest comes first, so that no process has a long file left where the other one has none.
FIRST = (
    *(f"tests/export/{name}" for name in SHARED), "tests/acceptance/", "tests/readme/",
    "tests/export/test_executorch.py", "tests/export/test_zoo.py", "tests/export/test_tasks.py",
    "tests/packaging/", "tests/export/test_vocabulary.py", "tests/export/", "tests/publish/",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    def place(item):
        return next((n for n, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST))

    items.sort(key=place)


def pytest_collection_finish():
    """What is imported now stays: the collector need not look at it again and again, nor at each tensor of a
    traced program."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist=loadfile`, with the files of `SHARED` as one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class SharedFiles(LoadFileScheduling):
        def _split_scope(self, nodeid):
            path = super()._split_scope(nodeid)
            return "tests/export" if path.removeprefix("tests/export/") in SHARED else path

    return SharedFiles(config, log)


WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "where", "is", "my", "card", "please", "i", "lost", "the", "money",
    "send", "it", "again", "late",
]  # fmt: skip


@pytest.fixture(scope="session")
def vit_dir(tmp_path_factory):
    """A Vision Transformer of two layers and 16 dimensions with its own head of three classes."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    root = tmp_path_factory.mktemp("base") / "vit"
    torch.manual_seed(7)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(root)
    processor = {"do_rescale": True, "rescale_factor": 1 / 255, "image_mean": [0.5], "image_std": [0.25]}
    (root / "preprocessor_config.json").write_text(json.dumps(processor))
    return root


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory):
    """A BERT encoder of two layers without a head, with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("base") / "bert"
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24,
    )  # fmt: skip
    BertModel(config).save_pretrained(root)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def digits_npz(tmp_path_factory):
    """60 grey pictures of 8x8 in three classes that differ in their bright columns."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    generator = np.random.default_rng(3)
    labels = np.arange(60) % 3
    images = generator.normal(90, 20, (60, 8, 8))
    for image, label in zip(images, labels, strict=True):
        image[:, 2 * label : 2 * label + 2] += 90
    np.savez(path, images=images.clip(0, 255).astype(np.uint8), labels=labels)
    return path


@pytest.fixture(scope="session")
def texts_csv(tmp_path_factory):
    """24 short texts of two intents."""
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    rows = ["text,label"]
    for n in range(12):
        rows += [f"where is my {WORDS[8 + n % 9]},card", f"send the {WORDS[8 + n % 9]} again,money"]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="session")
def make_variant():
    """Makes the shipped adapter with a slightly other core (bytes): another file that works as well."""
    from edge_tcur_runtime.formats.adapter import Adapter, parse_adapter, serialize_adapter

    adapter = parse_adapter((Path(__file__).parent / "data" / "adapter-v1.safetensors").read_bytes())

    def make(number: int) -> bytes:
        factors = {
            name: part.with_core((part.core * np.float32(1 + number / 1000)).astype(np.float32))
            for name, part in adapter.factors.items()
        }
        return serialize_adapter(Adapter(adapter.header, factors, adapter.extras))

    return make


class Server:
    """Serves a directory on loopback as any static server does, and counts."""

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        outer = self
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.sent = 0
        self.fault = lambda handler, content: content
        self.ranges = ranges

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.requests.append(self.path)
                outer.headers.append(dict(self.headers))
                path = folder / self.path.lstrip("/")
                if not path.is_file():
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content, start = path.read_bytes(), 0
                asked = self.headers.get("Range")
                if asked and outer.ranges:
                    start = int(asked.removeprefix("bytes=").rstrip("-"))
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                body = outer.fault(self, content[start:])
                if body is None:
                    self.close_connection = True
                    return
                self.wfile.write(body)
                outer.sent += len(body)
                if len(body) < len(content) - start:
                    self.close_connection = True

            def log_message(self, *_):
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def reset(self) -> None:
        self.requests.clear()
        self.sent = 0

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def make_server():
    """Serves a directory until the test ends."""
    made = []

    def make(folder, **options):
        made.append(Server(folder, **options))
        return made[-1]

    yield make
    for server in made:
        server.close()
