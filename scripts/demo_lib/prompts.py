"""What the demo asks: functions whose documentation the model shall write."""

from __future__ import annotations

CANDIDATES = (
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
