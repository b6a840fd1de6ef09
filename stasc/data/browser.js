"use strict";
// The trajectory browser. Everything a model wrote reaches the page as text nodes: nothing here parses HTML.
// Data (see nbs/12_view.ipynb): questions[split, id, text, references, context, iterations[n, initials[text, answer, reward, seed, tokens, cut off,
//   corrections[text, answer, reward, seed, tokens, cut off, kept, reason, outcome, pattern, tags]]]]
(async () => {
const $ = id => document.getElementById(id);
const el = (tag, cls, ...kids) => { const e = document.createElement(tag); if (cls) e.className = cls; e.append(...kids.filter(k => k != null)); return e; };
const said = x => x.toFixed(x === 0 || x === 1 ? 0 : 2);
const GLYPH = {fixed: "✓ fixed", broken: "✗ broken", stuck: "– stuck", stable: "= stable"};

// --- data
async function unpack(node) {
  const bytes = Uint8Array.from(atob(node.textContent.trim()), c => c.charCodeAt(0));
  return JSON.parse(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text());
}
if (typeof DecompressionStream === "undefined") { $("say").textContent = "This web browser is too old for the interactive view; the first page is below."; return; }
const D = await unpack($("data"));
for (const q of D.questions) {
  q.rows = q.iterations.flatMap(it => it.initials.flatMap(i => i.corrections.map(c => ({n: it.n, i, c}))));
  const mean = (rows, f) => rows.length ? rows.reduce((s, r) => s + f(r), 0) / rows.length : 0;
  for (const it of q.iterations) { it.r1 = mean(it.initials, i => i.reward); it.r2 = mean(it.initials.flatMap(i => i.corrections), c => c.reward); }
  const last = q.iterations[q.iterations.length - 1];
  q.gain = last ? last.r2 - q.iterations[0].r2 : 0; q.last = last ? last.r2 : 0;
  q.changes = q.rows.filter(r => r.c.outcome === "fixed" || r.c.outcome === "broken").length;
  q.length = Math.max(0, ...q.rows.map(r => r.i.tokens + r.c.tokens));
  q.asked = [q.id, q.text, ...q.references].join("\n").toLowerCase();
}

// --- what is chosen; all of it stands in the address
const CHOICES = {split: D.splits, outcome: ["", ...Object.keys(GLYPH)], kept: ["", "kept", "dropped"], pattern: ["", ...D.patterns, ...D.tags],
                 at: ["", ...D.iterations.map(String)], sort: ["order", "gain", "loss", "right", "wrong", "changes", "length"], only: ["", "1"], diff: ["1", ""]};
const S = Object.fromEntries(Object.entries(CHOICES).map(([k, v]) => [k, v[0]]));
Object.assign(S, {search: "", q: null, it: D.iterations[0]});
const SORT = {order: () => 0, gain: (a, b) => b.gain - a.gain, loss: (a, b) => a.gain - b.gain, right: (a, b) => b.last - a.last,
              wrong: (a, b) => a.last - b.last, changes: (a, b) => b.changes - a.changes, length: (a, b) => b.length - a.length};

function readAddress() {
  const p = new URLSearchParams(location.hash.slice(1));
  for (const [k, ok] of Object.entries(CHOICES)) if (p.has(k) && ok.includes(p.get(k))) S[k] = p.get(k);
  if (p.has("search")) S.search = p.get("search");
  if (p.has("q")) S.q = p.get("q");
  if (D.iterations.includes(Number(p.get("it") || NaN))) S.it = Number(p.get("it"));
}
function address() {
  const p = new URLSearchParams({split: S.split, q: S.q ?? "", it: S.it});
  for (const k of Object.keys(CHOICES)) if (k !== "split" && S[k] !== CHOICES[k][0]) p.set(k, S[k]);
  if (S.search) p.set("search", S.search);
  return "#" + p;
}
function writeAddress() { try { history.replaceState(null, "", address()); } catch { /* a frame without an address of its own */ } }

// --- filter, search, sort
const holds = (q, r, s) => (!S.outcome || r.c.outcome === S.outcome) && (!S.kept || r.c.kept === (S.kept === "kept")) &&
  (!S.pattern || r.c.pattern === S.pattern || r.c.tags.includes(S.pattern)) && (!S.at || r.n === Number(S.at)) &&
  (!s || q.asked.includes(s) || r.i.text.toLowerCase().includes(s) || r.c.text.toLowerCase().includes(s));
let found = [], n_rows = 0, page = 0;
function select() {
  const s = S.search.trim().toLowerCase(); found = []; n_rows = 0; let all = 0;
  for (const q of D.questions) {
    if (q.split !== S.split) continue;
    all += q.rows.length; q.matches = 0;
    for (const r of q.rows) if (r.match = holds(q, r, s)) q.matches++;
    if (q.matches) { found.push(q); n_rows += q.matches; }
  }
  found.sort(SORT[S.sort]);
  $("count").textContent = `${found.length.toLocaleString("en")} questions, ${n_rows.toLocaleString("en")} of ${all.toLocaleString("en")} trajectories`;
  let at = found.findIndex(q => q.id === S.q);
  if (at < 0) { at = 0; if (found.length) S.q = found[0].id; }
  page = Math.floor(at / D.page);
}

// --- the list
const cell = (r, cls) => { const b = el("i", cls); b.style.height = `${2 + Math.round(16 * r)}px`; return b; };
function item(q) {
  const bars = el("span", "bars", ...q.iterations.map(it => el("span", "", cell(it.r1, "r1"), cell(it.r2, "r2"))));
  const e = el("li", "", el("span", "name", q.text), bars);
  e.id = "q" + D.questions.indexOf(q); e.setAttribute("role", "option"); e.dataset.id = q.id; e.title = q.id;
  bars.title = "mean reward by iteration: " + q.iterations.map(it => `M_${it.n} ${said(it.r1)} → ${said(it.r2)}`).join(", ");
  e.onclick = () => { S.q = q.id; show(); };
  return e;
}
function list() {
  const pages = Math.max(1, Math.ceil(found.length / D.page));
  $("list").replaceChildren(...found.slice(page * D.page, (page + 1) * D.page).map(item));
  $("page").textContent = `page ${page + 1} of ${pages}`;
  $("previous").disabled = page === 0; $("next").disabled = page + 1 >= pages;
}
function mark() {
  for (const e of $("list").children) {
    const here = e.dataset.id === S.q;
    e.setAttribute("aria-selected", here);
    if (here) { $("list").setAttribute("aria-activedescendant", e.id); e.scrollIntoView({block: "nearest"}); }
  }
}

// --- word difference: longest common subsequence between the common start and the common end
function difference(a, b) {
  a = a.match(/\s+|[^\s]+/g) || []; b = b.match(/\s+|[^\s]+/g) || [];
  let start = 0, end = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const x = a.slice(start, a.length - end), y = b.slice(start, b.length - end), w = y.length + 1, out = [["", a.slice(0, start).join("")]];
  if (x.length * y.length > 4e6) return null;
  const t = new Uint32Array((x.length + 1) * w);
  for (let i = x.length - 1; i >= 0; i--) for (let j = y.length - 1; j >= 0; j--)
    t[i * w + j] = x[i] === y[j] ? t[(i + 1) * w + j + 1] + 1 : Math.max(t[(i + 1) * w + j], t[i * w + j + 1]);
  let i = 0, j = 0;
  while (i < x.length || j < y.length) {
    if (i < x.length && j < y.length && x[i] === y[j]) { out.push(["", x[i]]); i++; j++; }
    else if (j === y.length || (i < x.length && t[(i + 1) * w + j] >= t[i * w + j + 1])) out.push(["del", x[i++]]);
    else out.push(["ins", y[j++]]);
  }
  out.push(["", a.slice(a.length - end).join("")]);
  return out;
}
function compared(before, after) {
  const parts = S.diff && difference(before, after);
  if (!parts) return [after];
  const runs = [];
  for (const [k, s] of parts) if (s) runs.length && runs[runs.length - 1][0] === k ? runs[runs.length - 1][1] += s : runs.push([k, s]);
  return runs.map(([k, s]) => k ? el(k, "", s) : s);
}

// --- one question, its iterations side by side
function answer(a) {
  const right = a.reward >= D.threshold, graded = a.reward > 0 && a.reward < 1;
  const chip = el("b", right ? "right" : "wrong", `${right ? "✓" : "✗"} ${a.answer === null ? "no final answer" : a.answer === "" ? "empty answer" : a.answer}${graded ? ` · ${said(a.reward)}` : ""}`);
  chip.title = `extracted final answer, reward ${said(a.reward)}`;
  return el("div", "verdict", chip, a.cut ? el("em", "", "cut off") : null, el("small", "", `${a.tokens} tokens · seed ${a.seed}`));
}
const words = (...kids) => { const e = el("div", "text", ...kids); e.dir = "auto"; return e; };
function correction(r) {
  const c = r.c, fate = D.splits.indexOf("train") >= 0 && S.split === "train" ? (c.kept ? "kept: " : "dropped: ") + c.reason : c.reason;
  const e = el("div", `corr ${c.outcome}${r.match ? "" : " dim"}`, el("div", "tags", el("b", "", GLYPH[c.outcome]), el("span", c.kept ? "keep" : "", fate),
    ...[c.pattern, ...c.tags].filter(Boolean).map(t => el("span", "tag", t))), words(...compared(r.i.text, c.text)), answer(c));
  return e;
}
function column(q, it) {
  const rows = q.rows.filter(r => r.n === it.n), col = el("section", it.n === S.it ? "col here" : "col");
  col.append(el("h3", "", `M_${it.n}`, el("small", "", ` r(Y1) ${said(it.r1)} · r(Y2) ${said(it.r2)}`)));
  it.initials.forEach((i, j) => {
    const mine = rows.filter(r => r.i === i && (!S.only || r.match));
    if (S.only && !mine.length) return;
    col.append(el("div", "init", el("h4", "", `initial answer ${j + 1}`), words(i.text), answer(i), ...mine.map(correction)));
  });
  return col;
}
function detail() {
  const q = found.find(q => q.id === S.q), box = $("detail");
  if (!q) { box.replaceChildren(el("p", "none", "No trajectory matches. Esc clears the search; choose “any” in the filters.")); return; }
  const link = el("a", "", "link to this"); link.href = address();
  const refs = el("p", "refs", "reference: ", ...q.references.flatMap((r, k) => [k ? " / " : "", el("b", "", r)]));
  const title = el("h2", "", q.text); title.dir = "auto";
  box.replaceChildren(el("header", "", title, refs, q.context ? el("details", "", el("summary", "", "context"), words(q.context)) : null,
                         el("small", "", `${q.split} · ${q.id} · ${q.matches} of ${q.rows.length} trajectories match · `, link)),
                      el("div", "cols", ...q.iterations.map(it => column(q, it))));
  const here = box.querySelector(".here"), cols = box.querySelector(".cols");
  if (here) cols.scrollLeft = here.offsetLeft - cols.offsetLeft - 40;
}

// --- drawing
function show() { writeAddress(); mark(); detail(); }
function draw() {
  for (const k of Object.keys(CHOICES)) if ($(k)) $(k).type === "checkbox" ? $(k).checked = S[k] === "1" : $(k).value = S[k];
  if (document.activeElement !== $("search")) $("search").value = S.search;
  select(); list(); show();
}
const NAMES = {at: v => v === "" ? "any iteration" : `M_${v}`, outcome: v => v === "" ? "any outcome" : GLYPH[v], kept: v => v || "kept or dropped", pattern: v => v || "any pattern",
  sort: v => ({order: "in order", gain: "most gained", loss: "most lost", right: "most right", wrong: "most wrong", changes: "most changed", length: "longest"})[v], split: v => v};
for (const [k, name] of Object.entries(NAMES)) {
  $(k).replaceChildren(...CHOICES[k].map(v => { const o = el("option", "", name(v)); o.value = v; return o; }));
  $(k).onchange = e => { S[k] = e.target.value; draw(); };
}
for (const k of ["only", "diff"]) $(k).onchange = e => { S[k] = e.target.checked ? "1" : ""; show(); };
let wait; $("search").oninput = e => { clearTimeout(wait); wait = setTimeout(() => { S.search = e.target.value; draw(); }, 120); };
function turn(by) { page += by; if (found[page * D.page]) S.q = found[page * D.page].id; list(); show(); }
$("previous").onclick = () => turn(-1); $("next").onclick = () => turn(1);

// --- keys
function step(by) {
  const at = found.findIndex(q => q.id === S.q) + by;
  if (!found[at]) return;
  S.q = found[at].id;
  if (Math.floor(at / D.page) !== page) { page = Math.floor(at / D.page); list(); }
  show();
}
function move(by) { const at = D.iterations.indexOf(S.it) + by; if (at >= 0 && at < D.iterations.length) { S.it = D.iterations[at]; show(); } }
const KEYS = {ArrowDown: () => step(1), ArrowUp: () => step(-1), j: () => step(1), k: () => step(-1), ArrowRight: () => move(1), ArrowLeft: () => move(-1),
              "/": () => $("search").focus(), Escape: () => { S.search = $("search").value = ""; draw(); },
              PageDown: () => !$("next").disabled && turn(1), PageUp: () => !$("previous").disabled && turn(-1)};
$("browser").addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (/^(INPUT|SELECT)$/.test(e.target.tagName) && e.target.type !== "checkbox") { if (e.key === "Escape") { if (e.target === $("search")) KEYS.Escape(); $("list").focus(); } return; }
  if (KEYS[e.key]) { e.preventDefault(); KEYS[e.key](); }
});
document.addEventListener("keydown", e => { if (e.key === "/" && e.target === document.body) { e.preventDefault(); $("search").focus(); } });
window.addEventListener("hashchange", () => { readAddress(); draw(); });

$("static").remove(); $("browser").hidden = false;
readAddress(); draw();
document.documentElement.dataset.ready = "1";
})();
