"""What the demo asks: functions whose documentation the model shall write."""

from __future__ import annotations

import shutil
from pathlib import Path

from .checkpoint import END_OF_TEXT
from .corpus import source_entries

ALONE = ("def count_words(path)", "def remove_duplicates(items)", "class Stack")
LONG_PROMPT, SHARED_PREFIX = 3000, 900  # characters before the question; the model knows windows of 1024 tokens
LONG = "def rename_file(src, dst)"
TOGETHER = (
    "def find_files(directory, pattern)",
    "def is_empty(self)",
    "def connect(host, port, timeout=None)",
    "def to_json(obj, indent=None)",
    "def close(self)",
    "class FileLock",
)

CANDIDATES = (  # of which those above were chosen, when the model was there
    "def count_words(path)",
    "def remove_duplicates(items)",
    "def is_prime(n)",
    "def read_lines(path, encoding='utf-8')",
    "def parse_header(line)",
    "def find_files(directory, pattern)",
    "def merge_dicts(first, second)",
    "def copy_folder(src, dst, overwrite=False)",
    "def connect(host, port, timeout=None)",
    "def close(self)",
    "def __len__(self)",
    "def __eq__(self, other)",
    "def __repr__(self)",
    "def send_message(self, message)",
    "def get_user_name(self)",
    "def set_timeout(self, seconds)",
    "def download(url, filename)",
    "def split_path(path)",
    "def to_json(obj, indent=None)",
    "def from_bytes(data)",
    "def sorted_keys(mapping)",
    "def average(values)",
    "def wait_for_thread(thread, timeout=None)",
    "def lock(self)",
    "def is_empty(self)",
    "def has_key(self, key)",
    "def pop_first(self)",
    "def create_directory(path, mode=0o777)",
    "def rename_file(src, dst)",
    "def decode_text(data, encoding='utf-8', errors='strict')",
    "def format_date(date, fmt)",
    "def encode_base64(data)",
    "def random_choice(items)",
    "def load_module(name)",
    "def run_command(args, timeout=None)",
    "def compile_pattern(pattern, flags=0)",
    "def escape_html(text)",
    "def flush(self)",
    "class Stack",
    "class Queue",
    "class ConnectionError",
    "class ConfigParser",
    "class TimeoutError(Exception)",
    "class TextReader",
    "class TreeNode",
    "class FileLock",
)


def opening(signature: str) -> str:
    """The prompt for a function or class: up to where its documentation begins."""
    return f'{signature}:\n    """'


def documented_library(characters: int) -> str:
    """The functions of a module of the standard library, documented, as the model knows them: `characters` at most."""
    text = ""
    for entry in source_entries(Path(shutil.__file__)):
        if len(text) + len(entry.text) + len(END_OF_TEXT) > characters:
            break
        text += entry.text + END_OF_TEXT
    return text
