"""Six questions of every benchmark in its published schema, and a server that answers four of them rightly.

Four questions are of a first category (right, right, right, wrong), two of a second (right, wrong). Each image has a
colour of its own, by which the server knows the question.
"""

import base64
import csv
import io
import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

LETTERS = ["B", "A", "D", "C", "A", "B"]
TEXTS = {"A": "red", "B": "dark red", "C": "blue", "D": "3"}
RIGHT = [True, True, True, False, True, False]
NUM = len(LETTERS)
FIRST = slice(0, 4)


def colour(index: int, view: str = "full") -> tuple[int, int, int]:
    return (20 + 30 * index, 200 if view == "crop" else 60, 90)


def png(index: int, view: str = "full") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28) if view == "crop" else (84, 56), colour(index, view)).save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(index: int) -> str:
    return base64.b64encode(png(index)).decode()


def listed(separator: str = "\n", form: str = "({}) {}") -> str:
    return separator.join(form.format(letter, text) for letter, text in TEXTS.items())


def categories(first: str, second: str) -> list[str]:
    return [first] * 4 + [second] * 2


def parquet(path, **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def tsv(path, delimiter="\t", **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def structs(view: str = "full") -> list[dict]:
    return [{"bytes": png(i, view), "path": f"{i}.png"} for i in range(NUM)]


def vstar(folder):
    text = f"What is it?\n{listed()}\nAnswer with the option's letter from the given choices directly."
    parquet(
        folder / "data" / "test-00000-of-00001.parquet",
        image=structs(),
        text=[text] * NUM,
        label=LETTERS,
        question_id=[str(i) for i in range(4)] + ["0", "1"],  # numbered anew in each category
        category=categories("direct_attributes", "relative_position"),
    )


def options_columns() -> dict[str, list[str]]:
    return {letter: [text] * NUM for letter, text in TEXTS.items()}


def vstar_tsv(folder):
    images = [base64_png(i) for i in range(NUM)]
    tsv(
        folder / "VStarBench.tsv",
        index=range(NUM),
        image=images,
        question=["What is it?"] * NUM,
        **options_columns(),
        answer=LETTERS,
        category=categories("direct_attributes", "relative_position"),
    )


def zoombench(folder):
    choice = f"What is it?\n{listed(form='{}. {}')}"
    parquet(
        folder / "data" / "test.parquet",
        id=[f"z{i}" for i in range(NUM)],
        query=[choice] * 4 + ["How many birds are there?"] * 2,
        response=[*LETTERS[FIRST], "7", "two"],
        image=structs(),
        crop_image=structs("crop"),
    )


def hrbench(size):
    def write(folder):
        parquet(
            folder / f"hr_bench_{size}.parquet",
            index=list(range(NUM)),
            question=["What is it?"] * NUM,
            answer=LETTERS,
            **options_columns(),
            category=categories("single", "cross"),
            cycle_category=["0"] * NUM,
            image=[base64_png(i) for i in range(NUM)],
        )

    return write


def hrbench_tsv(folder):
    images = [base64_png(i) for i in range(NUM)]
    names = categories("single", "cross")
    questions = {"index": range(NUM), "question": ["What is it?"] * NUM, **options_columns(), "answer": LETTERS}
    tsv(folder / "hr_bench_4k.tsv", **questions, category=names, cycle_category=[0] * NUM, image=images)


def realworld(folder):
    parquet(
        folder / "data" / "train-00000-of-00001.parquet",
        bytes=[base64_png(i) for i in range(NUM)],
        index=[str(i) for i in range(NUM)],
        question=["What is it?"] * NUM,
        **{"multi-choice options": [[f"({k}) {v}" for k, v in TEXTS.items()]] * NUM},
        answer=LETTERS,
        category=categories("Perception/OCR with Complex Context", "Reasoning/Monitoring"),
        **{"l2-category": ["x"] * NUM},
    )


def realworld_tsv(folder):
    """As VLMEvalKit has it: the options as Python writes a list."""
    images = [base64_png(i) for i in range(NUM)]
    tsv(
        folder / "mme_realworld_lite.tsv",
        index=range(NUM),
        image=images,
        question=["What is it?"] * NUM,
        **{"multi-choice options": [str([f"({k}) {v}" for k, v in TEXTS.items()])] * NUM},
        answer=LETTERS,
        category=categories("Perception/OCR with Complex Context", "Reasoning/Monitoring"),
    )


def visualprobe(folder):
    for level, indices in (("Easy", range(4)), ("Hard", range(4, 6))):
        images = folder / f"VisualProbe_{level}" / "data"
        images.mkdir(parents=True)
        records = []
        for i in indices:
            (images / f"{i}.png").write_bytes(png(i))
            name = f"VisualProbe_{level}/data/{i}.png"
            records.append({"images": [name], "problem": "<image>\nWhat is written there?", "solution": f"Exit {i}"})
        (images.parent / "val.json").write_text(json.dumps(records))


def mmvp(folder):
    images = folder / "MMVP Images"
    images.mkdir(parents=True)
    for i in range(NUM):
        Image.new("RGB", (84, 56), colour(i)).save(images / f"{i + 1}.jpg", quality=100)
    tsv(
        folder / "Questions.csv",
        ",",
        Index=range(1, NUM + 1),
        Question=["Is it open, or closed?"] * NUM,
        Options=["(a) Open (b) Closed"] * NUM,
        **{"Correct Answer": ["(a)", "(b)"] * 3},
    )


def mmvp_tsv(folder):
    tsv(
        folder / "MMVP.tsv",
        index=range(1, NUM + 1),
        image=[base64_png(i) for i in range(NUM)],
        question=["Is it open, or closed?"] * NUM,
        A=["Open"] * NUM,
        B=["Closed"] * NUM,
        answer=["A", "B"] * 3,
    )


def mmvp_parquet(folder):
    parquet(
        folder / "data" / "train-00000-of-00001.parquet",
        image=structs(),
        Index=list(range(1, NUM + 1)),
        Question=["Is it open, or closed?"] * NUM,
        Options=["(a) Open (b) Closed"] * NUM,
        **{"Correct Answer": ["(a)", "(b)"] * 3},
    )


def cv_bench(folder):
    prompt = f"What is it? Select from the following choices.\n{listed()}"
    for name, kind, part, source in (("test_2d", "2D", FIRST, "COCO"), ("test_3d", "3D", slice(4, 6), "Omni3D")):
        num = len(LETTERS[part])
        parquet(
            folder / f"{name}.parquet",
            idx=list(range(num)),
            type=[kind] * num,
            task=["Count"] * num,
            image=structs()[part],
            question=["What is it?"] * num,
            choices=[list(TEXTS.values())] * num,
            answer=[f"({letter})" for letter in LETTERS[part]],
            prompt=[prompt] * num,
            source=[source] * num,
        )


def mmstar(folder):
    parquet(
        folder / "mmstar.parquet",
        index=list(range(NUM)),
        question=[f"What is it?\nOptions: {listed(', ', '{}: {}')}"] * NUM,
        image=[png(i) for i in range(NUM)],
        answer=LETTERS,
        category=categories("coarse perception", "math"),
        l2_category=["image emotion"] * NUM,
        meta_info=[{"source": "x"}] * NUM,
    )


def pope(folder):
    parquet(
        folder / "data" / "test-00000-of-00001.parquet",
        id=[str(i) for i in range(NUM)],
        question_id=[str(i) for i in range(4)] + ["0", "1"],
        question=["Is there a dog in the image?"] * NUM,
        answer=["yes", "no"] * 3,
        image_source=["COCO"] * NUM,
        image=structs(),
        category=categories("adversarial", "random"),
    )


def pope_tsv(folder):
    names = categories("adversarial", "random")
    columns = {"index": range(NUM), "image": [base64_png(i) for i in range(NUM)], "category": names}
    tsv(folder / "POPE.tsv", **columns, question=["Is there a dog in the image?"] * NUM, answer=["Yes", "No"] * 3)


PUBLISHED: dict[str, dict[str, Callable]] = {
    "vstar": {"parquet": vstar, "tsv": vstar_tsv},
    "zoombench": {"parquet": zoombench},
    "hrbench-4k": {"parquet": hrbench("4k"), "tsv": hrbench_tsv},
    "hrbench-8k": {"parquet": hrbench("8k")},
    "mme-realworld": {"parquet": realworld},
    "mme-realworld-cn": {"parquet": realworld},
    "mme-realworld-lite": {"parquet": realworld, "tsv": realworld_tsv},
    "visualprobe": {"json": visualprobe},
    "mmvp": {"csv": mmvp, "tsv": mmvp_tsv, "parquet": mmvp_parquet},
    "cv-bench": {"parquet": cv_bench},
    "mmstar": {"parquet": mmstar},
    "pope": {"parquet": pope, "tsv": pope_tsv},
}

REPLIES = {letter: f"The answer is ({letter})." for letter in TEXTS}
WRONG = {"A": "B", "B": "C", "C": "D", "D": "red"}


def reply(name: str, index: int, view: str) -> str:
    """What the server says to question `index` of benchmark `name`; crops are always read rightly."""
    right = RIGHT[index] or view == "crop"
    if name == "pope":
        answer = index % 2 == 0
        return "Yes, there is." if answer == right else "No"
    if name == "mmvp":
        return "ab"[index % 2 if right else 1 - index % 2]
    if name == "visualprobe":
        return f"It says exit {index}" if right else "It is hard to say"
    if name == "zoombench" and index > 3:
        return ("seven" if index == 4 else "2.") if right else "eleven"
    return REPLIES[LETTERS[index]] if right else WRONG[LETTERS[index]]


class Server:
    """An OpenAI-compatible chat endpoint; `answer(text, image)` gives a reply or an HTTP code; `failures` requests fail
    first; `raw` (code, body) is what it sends instead."""

    def __init__(self, answer: Callable[[str, Image.Image | None], object]) -> None:
        self.answer, self.failures, self.requests = answer, 0, []
        self.raw: tuple[int, object] | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((body, self.headers.get("Authorization")))
                if server.failures:
                    server.failures -= 1
                    return self.send(503, {"error": {"message": "busy"}})
                if (raw := server.raw) is not None:
                    return self.send(*raw)
                if body["model"] == "unknown":
                    return self.send(404, {"error": {"message": "no such model"}})
                parts = body["messages"][0]["content"]
                text = next(part["text"] for part in parts if part["type"] == "text")
                urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
                data = base64.b64decode(urls[0].split(",", 1)[1]) if urls else None
                image = Image.open(io.BytesIO(data)) if data else None
                said = server.answer(text, image)
                if isinstance(said, int):
                    return self.send(said, {"error": {"message": "this model's maximum context length is 8"}})
                message = {"role": "assistant", "content": said}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                return self.send(
                    200,
                    {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]},
                )

            def send(self, code: int, content: object) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield self
        self._http.shutdown()
        self._http.server_close()


def which(image: Image.Image) -> tuple[int, str]:
    """(index of the question, view) that `image` belongs to."""
    red, green, _ = image.convert("RGB").getpixel((3, 3))
    return round((red - 20) / 30), "crop" if green > 130 else "full"
