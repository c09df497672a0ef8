"""The code tasks as the harness' tasks, without its grader: that one loads from the hub and runs what it is given.

Prompts, examples and stop texts are those of lm-evaluation-harness 0.4.13 (MIT), the three examples rows 2 to 4 of MBPP
(Google, CC BY 4.0). Answers are graded afterwards, in the sandbox (see grading.py).
"""

from __future__ import annotations

from typing import Any

UNGRADED = [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}]
FENCE = "```"

MBPP_EXAMPLES = [
    {
        "text": "Write a function to find the similar elements from the given two tuple lists.",
        "code": "def similar_elements(test_tup1, test_tup2):\r\n  res = tuple(set(test_tup1) & set(test_tup2))\r\n"
        "  return (res) ",
        "test_list": [
            "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)",
            "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)",
            "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)",
        ],
        "is_fewshot": True,
    },
    {
        "text": "Write a python function to identify non-prime numbers.",
        "code": "import math\r\ndef is_not_prime(n):\r\n    result = False\r\n"
        "    for i in range(2,int(math.sqrt(n)) + 1):\r\n        if n % i == 0:\r\n            result = True\r\n"
        "    return result",
        "test_list": [
            "assert is_not_prime(2) == False",
            "assert is_not_prime(10) == True",
            "assert is_not_prime(35) == True",
        ],
        "is_fewshot": True,
    },
    {
        "text": "Write a function to find the largest integers from a given list of numbers using heap queue "
        "algorithm.",
        "code": "import heapq as hq\r\ndef heap_queue_largest(nums,n):\r\n  largest_nums = hq.nlargest(n, nums)\r\n"
        "  return largest_nums",
        "test_list": [
            "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],3)==[85, 75, 65] ",
            "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],2)==[85, 75] ",
            "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],5)==[85, 75, 65, 58, 35]",
        ],
        "is_fewshot": True,
    },
]

_MBPP_TESTS = "{{test_list[0]}}\n{{test_list[1]}}\n{{test_list[2]}}"


def humaneval(name: str, dataset: str, chat: bool) -> dict[str, Any]:
    """HumanEval: the function's head is the prompt, or with a chat template the beginning of the answer."""
    asked = "Write a solution to the following problem and make sure that it passes the tests:\n"
    return {
        "task": name,
        "dataset_path": dataset,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": asked + FENCE + "python\n{{ prompt }}\n" + FENCE + "\n" if chat else "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "gen_prefix": f"Here is the completed function:\n{FENCE}python\n" + "{{ prompt }}\n" if chat else None,
        "metric_list": UNGRADED,
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint", *([FENCE] if chat else [])],
            "do_sample": False,
        },
        "metadata": {"version": 4.0 if chat else 1.0},
    }


def mbpp(name: str, dataset: str, subset: str | None, chat: bool) -> dict[str, Any]:
    """MBPP: text and tests, three examples before it, code until [DONE] (with a chat template until its block ends)."""
    text = "{{prompt if prompt is defined else text}}"
    asked = "You are an expert Python programmer, and here is your task:"
    plain = f"{asked} {text} Your code should pass these tests:\n\n{_MBPP_TESTS}\n[BEGIN]\n"
    turn = f"{asked}\n{text}\nYour code should pass these tests:\n{_MBPP_TESTS}"
    end = FENCE if chat else "[DONE]"
    return {
        "task": name,
        "dataset_path": dataset,
        "dataset_name": subset,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": turn if chat else plain,
        "doc_to_target": "{% if is_fewshot is defined %}{{code}}\n" + end + "{% else %}" + _MBPP_TESTS + "{% endif %}",
        "gen_prefix": f"\n{FENCE}python\n" if chat else None,
        "target_delimiter": "",
        "fewshot_config": {"sampler": "first_n", "samples": MBPP_EXAMPLES},
        "metric_list": UNGRADED,
        "generation_kwargs": {"until": [end], "do_sample": False},
        "metadata": {"version": 1.0},
    }
