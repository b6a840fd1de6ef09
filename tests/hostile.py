"Twenty texts that a model may write and that must be shown as text, wherever they are shown; and a run full of them."
from stasc.core import Config, Question
from stasc.data import Data
from stasc.loop import STaSC
from stasc.train import ScriptedEngine

HOSTILE = {
    "script": "<script>alert('script'); document.body.append(Object.assign(document.createElement('p'), {id: 'pwned'}))</script>",
    "image": "<img src=x onerror=\"alert('image')\">",
    "remote image": "<img src='http://example.invalid/pixel.png'>",
    "end of script": "</script><script>alert('end')</script>",
    "end of frame": "\"></iframe><script>alert('frame')</script>",
    "end of details": "</details></div></main><h1 id=pwned>out</h1>",
    "link": "[click](javascript:alert(1)) <a href=\"javascript:alert('link')\">click</a>",
    "style": "<style>body{display:none}</style>",
    "svg": "<svg onload=alert('svg')><animate onbegin=alert('animate') attributeName=x></svg>",
    "entity": "&lt;script&gt;alert('entity')&lt;/script&gt; &amp;amp; &#x3c;b&#x3e;",
    "comment": "<!-- --!> <![CDATA[ ]]> <?php ?> <!doctype html>",
    "template": "{{constructor.constructor('alert(1)')()}} ${alert(1)} `alert(1)`",
    "mathematics": "$$\\frac{1}{0}$$ $x_i$ \\(\\href{javascript:alert(1)}{y}\\)",
    "markdown": "# heading\n\n* item\n\n| a | b |\n|---|---|\n| ![x](http://example.invalid/y.png) | **bold** |",
    "right to left": "safe \u202eelbasrever\u202c \u200f\u061c \u2067אבג\u2069 end",
    "terminal": "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J \r over \x08\x00",
    "not UTF-8": b"bytes \xff\xfe\x80 as tokenizers decode them".decode("utf-8", "replace"),
    "quotes": "' \" ` onmouseover=alert('quotes') ' x=\"",
    "one long line": "A" * 1_000_000,
    "combining": "Z" + "\u0341" * 400 + " 🙂👩‍👩‍👧‍👦 \ufeff\u2028",
}


def hostile_run(folder):
    "A run whose questions, ids, references and answers are hostile; every other correction is right, all are different from their answer."
    names = list(HOSTILE)
    short = [HOSTILE[name][:200] for name in names]
    train = [Question(f"case {i:02d} {s}", f"case {i:02d}: {s}", (f"{s} gold", "gold")) for i, s in enumerate(short)]
    test = [Question("held out", "case 99: plain", ("gold",))]

    def script(prompt, rng, skill):
        case = int(prompt[prompt.rfind("case ") + 5:][:2]) if "case " in prompt else 99
        text = HOSTILE[names[case]] if case < len(names) else "plain"
        if "Write the correction" not in prompt: return f"{text}\nFinal Answer: {text}"
        return f"{text} and more\nFinal Answer: " + ("gold" if case % 2 or case == 99 else text)
    cfg = Config(iterations=1, n_init=1, n_corr=1, n_train=len(train), n_test=1, reward="exact_match", prompts="default")
    return STaSC(cfg, folder, data=Data(train, test), engine=ScriptedEngine(script), callbacks=[]).run()
