"""What the demo asks: functions whose documentation the model shall write."""

from __future__ import annotations

from .checkpoint import END_OF_TEXT
from .corpus import definition

ALONE = ("def hash_file(path)", "def as_bytes(self)", "class ProtocolError(Exception)")
LONG = "def get_header(self, name, default=None)"  # asked behind MODULE
TOGETHER = (  # asked behind the first SHARED entries of MODULE, which the server computes once
    "def send_command(self, command)",
    "def is_empty(self)",
    "def read_lines(self)",
    "def decode_base64(data)",
    "def to_dict(self)",
    "def stop(self)",
)

SHARED = 6
MODULE = (  # written for the demo; the model has not seen it
    ("class MailQueue", "A queue of messages that wait to be sent.\n\nThe queue is kept in a folder, one file for each message."),
    ("class QueueError(Exception)", "Raised when a message cannot be read from the queue, or written to it."),
    (
        "def open_queue(path, *, create=False)",
        "Open the queue in the folder path.\n\nIf create is true and the folder does not exist, it is created.",
    ),
    ("def put_message(self, message)", "Add a message to the end of the queue and return its number."),
    ("def remove_message(self, number)", "Remove the message with the given number. If there is none, raise KeyError."),
    ("def oldest(self)", "Return the message that was added first, or None if the queue is empty."),
    ("def sender(self)", "Return the address in the From header of the message."),
    ("def recipients(self)", "Return a list of the addresses in the To and Cc headers."),
    (
        "def connect_server(host, port=25, timeout=None)",
        (
            "Connect to the mail server on host and return the connection.\n\n"
            "timeout is the number of seconds to wait. If it is None, wait until the server answers.\n\n"
            "If the server refuses the connection, ConnectionRefusedError is raised."
        ),
    ),
    ("def greet(self, name)", "Tell the server the name of this host, and read the list of extensions that it supports."),
    (
        "def deliver(self, message)",
        "Send a message to the server.\n\nReturn True if the server has accepted it for all recipients, False otherwise.",
    ),
    (
        "def deliver_all(self, *, limit=None)",
        (
            "Send the messages of the queue, the oldest first.\n\n"
            "A message that was accepted is removed from the queue. A message that was refused stays, and is sent again later.\n\n"
            "If limit is given, stop after that number of messages."
        ),
    ),
    ("def hang_up(self)", "Tell the server that this was all, and close the connection."),
    (
        "class DeliveryThread(Thread)",
        (
            "A thread that sends the messages of a queue.\n\n"
            "The thread sleeps while the queue is empty. It ends when its stop method is called."
        ),
    ),
    ("def wake(self)", "Wake the thread up, because a message was added to the queue."),
    ("def last_error(self)", "Return the last error of the thread as a string, or None if there was no error."),
)

CANDIDATES = (  # what scripts/train_demo.py asks each model that it trained
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


def prompts() -> tuple[list[str], list[str]]:
    """Those to ask one after another, and those to ask at once."""
    module = [definition(*entry) + END_OF_TEXT for entry in MODULE]
    shared = "".join(module[:SHARED])
    return [*map(opening, ALONE), "".join(module) + opening(LONG)], [shared + opening(signature) for signature in TOGETHER]
