"""The report's HTML (Jinja2): one page, inline style, no scripts, no outside resources."""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ analysis.title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1d2329; --soft: #59616a; --line: #e3e7eb; --paper: #ffffff;
  --ground: #f5f6f8; --accent: #0068a3; --note: #fff8e8; --yes: #00734f; --opposite: #b34700; --no: #59616a;
  --open: #7a5b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3abb3; --line: #343b42; --paper: #1b2026;
  --ground: #12161a; --accent: #6cb8ea; --note: #2b2618; --yes: #4fc79d; --opposite: #ff9a5c; --no: #a3abb3;
  --open: #dfb84d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); -webkit-font-smoothing: antialiased;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 0 24px 64px; overflow-wrap: break-word; }
header { padding: 48px 0 20px; }
h1 { font-size: 34px; line-height: 1.15; margin: 0 0 8px; letter-spacing: -0.015em; }
h2 { font-size: 20px; margin: 0 0 12px; letter-spacing: -0.005em; }
.lead { color: var(--soft); margin: 0; max-width: 46em; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 22px 26px;
  margin: 18px 0; }
.key { display: inline-flex; align-items: center; gap: 7px; }
table .key { white-space: nowrap; }
.dot { width: 11px; height: 11px; border-radius: 50%; flex: none; }
.findings { margin: 0; padding: 0; list-style: none; }
.findings li { padding: 7px 0 7px 20px; position: relative; font-size: 17px; }
.findings li::before { content: ""; position: absolute; left: 2px; top: 17px; width: 7px; height: 7px;
  border-radius: 2px; background: var(--c); }
.caveats { margin: 14px 0 0; padding: 12px 16px; background: var(--note); border-left: 3px solid #e69f00;
  border-radius: 4px; font-size: 14.5px; }
.caveats p { margin: 3px 0; }
img { display: block; width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
img + .note { margin-bottom: 18px; }
img + img { margin-top: 14px; }
.claims { display: grid; gap: 12px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(170px, 100%), 1fr)); gap: 10px;
  margin: 0 0 16px; padding: 0; list-style: none; font-size: 14.5px; }
.answers li { border-top: 4px solid var(--v); background: var(--ground); border-radius: 6px; padding: 8px 12px; }
.answers .verdict { display: block; font-size: 17px; line-height: 1.3; }
.claim { border: 1px solid var(--line); border-left: 5px solid var(--v); border-radius: 8px; padding: 12px 16px; }
.claim h3 { font-size: 17px; line-height: 1.35; margin: 0 0 4px; font-weight: 600; }
.verdict { color: var(--v); font-weight: 700; }
.yes { --v: var(--yes); } .opposite { --v: var(--opposite); } .no { --v: var(--no); } .open { --v: var(--open); }
.parts { margin: 8px 0 0; padding: 0; list-style: none; font-size: 14.5px; }
.parts li { margin: 7px 0; }
.parts .rule { color: var(--soft); font-size: 13.5px; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
thead th { border-bottom: 0; }
thead tr:last-child th { border-bottom: 2px solid var(--line); }
table.even { table-layout: fixed; min-width: 560px; }
table.runs td, td.whole, td.whole small { white-space: nowrap; }
table.even .key { white-space: normal; overflow-wrap: anywhere; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
tr:last-child td { border-bottom: 0; }
td small { color: var(--soft); display: block; font-size: 12.5px; }
th.group { text-align: center; border-bottom: 0; }
td.bar { background-image: linear-gradient(var(--c), var(--c)), linear-gradient(var(--line), var(--line));
  background-repeat: no-repeat; background-size: var(--w) 3px, 100% 3px; background-position: left bottom;
  background-origin: content-box; min-width: 96px; padding-bottom: 8px; }
td.faint { color: var(--soft); }
td small { font-weight: 400; }
.strong { font-weight: 650; }
.note { color: var(--soft); font-size: 13.5px; margin: 12px 0 0; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--accent); font-size: 14.5px; }
pre { background: var(--ground); padding: 12px 14px; border-radius: 6px; font-size: 12.5px; overflow-x: auto; }
footer { color: var(--soft); font-size: 13px; padding: 8px 2px; }
@media (max-width: 640px) { main { padding: 0 12px 40px; } section { padding: 16px; } h1 { font-size: 27px; } }
@media print { section, .claim { break-inside: avoid; } main { max-width: none; } }
</style>
</head>
<body>
{% macro key(label) -%}
<span class="key"><span class="dot" style="background: {{ colours[label] }}"></span>{{ label }}</span>
{%- endmacro %}
{% macro picture(name) -%}
<img src="data:image/svg+xml;base64,{{ pictures[name].svg }}"
  style="max-width: {{ pictures[name].width }}px" alt="{{ pictures[name].text }}">
{%- endmacro %}
{% macro breakdown(rows, heading) %}
<div class="scroll"><table>
<thead>
<tr><th></th>{% for c in found %}<th class="group" colspan="2">{{ key(c.label) }}</th>{% endfor %}</tr>
<tr><th>{{ heading }}</th>{% for c in found %}<th>untrained</th><th>final</th>{% endfor %}</tr>
</thead>
<tbody>
{% for row in rows %}
<tr><td>{{ row.name }}</td>
{% for cell in row.cells %}
<td class="faint">{{ cell.untrained | decimals }}</td>
<td class="bar strong" style="--c: {{ colours[found[loop.index0].label] }}; --w: {{ cell.final | percent }}">
{{- cell.final | decimals }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<main>
<header>
<h1>{{ analysis.title }}</h1>
<p class="lead">When single attention heads of a masked language model begin to follow syntactic dependencies (UAS),
when it begins to prefer grammatical sentences (BLiMP), and what its loss does meanwhile.
{{ run_rows | length }} run{{ "s" if run_rows | length > 1 }},
{{ found | length }} condition{{ "s" if found | length > 1 }}, up to {{ "{:,}".format(last_step) }} steps.</p>
</header>

<section>
<h2>Five claims about how syntax is acquired</h2>
<ul class="answers">
{% for claim in analysis.claims %}
<li class="{{ verdicts.get(claim.verdict, "no") }}">{{ claim.number }}. {{ claim.name }}
<span class="verdict">{{ claim.verdict }}</span></li>
{% endfor %}
</ul>
<div class="claims">
{% for claim in analysis.claims %}
<div class="claim {{ verdicts.get(claim.verdict, "no") }}">
<h3>{{ claim.number }}. {{ claim.statement }}</h3>
<span class="verdict">{{ claim.verdict }}</span>
<ul class="parts">
{% for part in claim.parts %}
<li class="{{ verdicts.get(part.verdict, "no") }}">{{ part.statement }} <span class="verdict">{{ part.verdict }}</span>
{%- if part.missing %} (missing: {{ part.missing }}){% endif %}
{% for sentence in part.evidence %} {{ sentence }}{% endfor %}
<span class="rule">Rule: shown if {{ part.rule }}.{% if not part.core %} Counts only where it can be tested.{% endif %}
</span></li>
{% endfor %}
</ul>
</div>
{% endfor %}
</div>
<p class="note">Claims of Chen et al., <em>Sudden Drops in the Loss</em> (ICLR 2024). The rules are part of the
program, not chosen for these runs. A claim is opposite where a necessary part is, otherwise not testable where one is
not testable, and shown where all parts that can be tested are. “Not shown” is no proof of the contrary: few seeds show
only large effects.</p>
{% if analysis.notes %}
<div class="caveats">{% for note in analysis.notes %}<p>{{ note }}</p>{% endfor %}</div>
{% endif %}
</section>

<section>
<h2>Results by condition</h2>
<div class="scroll"><table>
<thead><tr><th>condition</th><th class="text">λ</th><th>runs</th>
{%- for m in table_metrics %}<th>{{ m.title }} {{ "↓" if m.sign < 0 else "↑" }}</th>{% endfor %}</tr></thead>
<tbody>
{% for c in found %}
<tr><td>{{ key(c.label) }}</td><td class="text faint">{{ c.runs[0].describe_schedule() }}</td>
<td>{{ c.runs | length }}</td>
{% for m in table_metrics %}
<td class="strong whole">{{ c.final.get(m.name) | show }}
{%- if m.name in c.difference %}{% set d = c.difference[m.name] %}
<small>{{ d.value | show(true) }} to base</small>
{%- if d.holm is not none %}<small>p {{ d.holm | p }}</small>{% endif %}{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="note">Final values, mean ± standard error over runs (seeds). Differences to the base are paired where the
seeds are the
same (paired t test, else Welch's); p is corrected (Holm) over all differences in this table.
{%- if analysis.to_controls %} Differences to controls are below.{% endif %}</p>
{% if analysis.to_controls %}
<details><summary>Differences to controls</summary>
<div class="scroll"><table>
<thead><tr><th>condition</th><th class="text">minus</th><th class="text">measure</th><th>difference</th><th>p</th>
<th>p (Holm)</th></tr></thead>
<tbody>
{% for c in analysis.to_controls %}
<tr><td>{{ key(c.left) }}</td><td class="text">{{ key(c.right) }}</td><td class="text">{{ c.metric.title }}</td>
<td>{{ c.value | show(true) }}</td><td>{{ "–" if c.value.p is none else c.value.p | p }}</td>
<td>{{ "–" if c.holm is none else c.holm | p }}</td></tr>
{% endfor %}
</tbody></table></div></details>
{% endif %}
</section>

<section>
<h2>Trajectories</h2>
{{ picture("trajectories") }}
<p class="note">Curves: evaluations on held-out data
{%- if training_loss %} (but the loss is that of training, averaged between evaluations){% endif %}, means over runs
thick; faint: training loss. Thin vertical
lines mark
onsets, the strongest bend of the curve at a scale of {{ "%g" | format(analysis.delta) }} steps, where it is larger
than noise; dots
at the foot are single runs'
{%- if analysis.with_items %}, whiskers the middle 95 % over {{ analysis.replicates }} resamplings of
evaluation sentences and pairs (UAS and BLiMP of {{ analysis.with_items | length }} of {{ run_rows | length }}
runs){% endif %}.</p>
</section>

<section>
<h2>What happened</h2>
<ul class="findings">
{% for finding in analysis.findings %}
<li style="--c: {{ colours[finding.label] }}">{{ finding.text }}</li>
{% endfor %}
</ul>
</section>

{% if order_rows %}
<section>
<h2>Structure before capabilities?</h2>
<div class="scroll"><table>
<thead><tr><th>condition</th><th>runs with both onsets</th><th>lag of BLiMP (steps)</th><th>95 % over seeds</th>
<th>95 % over items</th><th>structure first / last</th><th>sign test p</th><th>replicates with structure first</th>
<th class="text">structure comes</th></tr></thead>
<tbody>
{% for row in order_rows %}
<tr><td>{{ key(row.label) }}</td><td>{{ row.runs }}</td><td class="strong">{{ row.lag }}</td><td>{{ row.seeds }}</td>
<td>{{ row["items"] }}</td><td>{{ row.signs }}</td><td>{{ row.sign_p }}</td><td>{{ row.shares }}</td>
<td class="text">{{ row.verdict }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">Over the runs in which UAS and BLiMP both break clearly. The order counts as established where the
intervals of the
mean lag leave out 0 and the mean is at least one evaluation interval. Replicates: of each run in turn.</p>
</section>
{% endif %}

{% if "lambda" in pictures or stage_pictures %}
<section>
<h2>How much suppression, and for how long</h2>
{% if "lambda" in pictures %}
{{ picture("lambda") }}
<p class="note">Final values over λ, for conditions whose λ is constant: mean ± standard error over runs, dots are
runs. Squares:
the same regularizer on heads that are not syntax. Triangles: mean over training (area under the curve by its
length).</p>
{% endif %}
{% for p in stage_pictures %}
{{ picture(p.name) }}
<p class="note">Final values over the step at which λ is released; lines are the base and the condition that is never
released.</p>
{% endfor %}
</section>
{% endif %}

{% if "relations" in pictures or "heads" in pictures %}
<section>
<h2>Which heads follow which relation, and since when</h2>
{% if "heads" in pictures %}
{{ picture("heads") }}
<p class="note">One run: the head that ends best at each relation (layer, head, direction), followed back through
training. A dot
marks where half of its rise is done.</p>
{% endif %}
{% if "relations" in pictures %}
{{ picture("relations") }}
<p class="note">Accuracy of the best head of each relation, chosen anew at every step, mean over runs.</p>
{% endif %}
</section>
{% endif %}

{% if "complexity" in pictures %}
<section>
<h2>Complexity</h2>
{{ picture("complexity") }}
<p class="note">What was measured of: intrinsic dimension (TwoNN) of [CLS] vectors, weight norm, mean entropy of
attention, and the
mean probability that the best head gives to a word's syntactic head.</p>
</section>
{% endif %}

<section>
<h2>Onsets of every run</h2>
<div class="scroll"><table class="even">
<thead>
<tr><th>run</th>{% for m in measured %}<th>{{ m.title }} {{ "↓" if m.sign < 0 else "↑" }}</th>{% endfor %}</tr>
</thead>
<tbody>
{% for row in onset_rows %}
<tr><td>{{ key(row.label) }}{% if row.name != row.label %}<small>{{ row.name }}</small>{% endif %}</td>
{% for m in metrics %}{% if m in measured %}{% set cell = row.cells[loop.index0] %}
<td class="{{ "strong" if cell.is_clear else "faint" }}">{{ cell.step }}
{%- for note in cell.notes %}<small>{{ note }}</small>{% endfor %}</td>
{% endif %}{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="note">The break of a curve f is the step t with the largest bend [f(t+Δ) − f(t)] − [f(t) − f(t−Δ)], Δ =
{{ "%g" | format(analysis.delta) }} steps, f linear between evaluations; for losses the largest downward. It is clear
(bold) when
it is larger than noise as strong as this curve's would produce by chance in 95 of 100 curves. “Items”: 95 % of the
breaks of
curves from resampled sentences and pairs, where results of single items were measured. “Change point”: straight
pieces fitted by least squares; the change lies after the first step and not after the second.</p>
</section>

{% if relation_rows %}
<section>
<h2>Syntax by relation</h2>
<div class="scroll"><table>
<thead>
<tr><th></th><th></th><th></th>
{%- for c in found %}<th class="group" colspan="2">{{ key(c.label) }}</th>{% endfor %}</tr>
<tr><th>relation</th><th>edges</th><th>fixed offset</th>
{%- for c in found %}<th>untrained</th><th>final</th>{% endfor %}</tr>
</thead>
<tbody>
{% for row in relation_rows %}
<tr><td>{{ row.relation }}</td><td class="faint">{{ row.count if row.count is not none else "–" }}</td>
<td class="faint">{{ row.baseline | decimals }}{% if row.offset %} ({{ row.offset }}){% endif %}</td>
{% for cell in row.cells %}
<td class="faint">{{ cell.untrained | decimals }}</td>
<td class="bar strong" style="--c: {{ colours[found[loop.index0].label] }}; --w: {{ cell.final | percent }}">
{{- cell.final | decimals }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="note">Share of dependencies that the best single attention head finds. The best head is chosen per relation
on
these same sentences: compare with the untrained model, of which the same best is taken, and with the best fixed
offset
(the head is the word so many places to the right).
{%- if uas_baseline is not none %} Over all relations the fixed offsets reach {{ uas_baseline | decimals(3) }}.
{%- endif %}
</p>
</section>
{% endif %}

{% if field_rows %}
<section>
<h2>Grammar by field</h2>
{% for name in ("fields", "fields_over_steps") %}{% if name in pictures %}
{{ picture(name) }}
{% endif %}{% endfor %}
<details><summary>As a table</summary>{{ breakdown(field_rows, "field") }}</details>
{% if set_rows %}
<details><summary>All {{ set_rows | length }} sets</summary>{{ breakdown(set_rows, "set") }}</details>
{% endif %}
<p class="note">Share of minimal pairs of which the model gives the grammatical sentence the higher
pseudo-log-likelihood; chance is 0.50.</p>
</section>
{% endif %}

<section>
<h2>Runs</h2>
<div class="scroll"><table class="runs">
<thead><tr>{% for name in run_rows[0].facts %}<th class="text">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in run_rows %}
<tr>{% for name, value in row.facts.items() %}
<td class="text">
{%- if name == "Condition" %}{{ key(value) }}{% else %}{{ "–" if value is none else value }}{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% for row in run_rows %}
<details><summary>Configuration of {{ row.name }}</summary><pre>{{ row.config }}</pre></details>
{% endfor %}
</section>

<footer>megatron_sas {{ version }} · λ is the weight of the SAS term: loss = MLM + λ·R; λ &gt; 0 suppresses syntactic
attention, λ &lt; 0 promotes it. Values after ± are standard errors over runs.</footer>
</main>
</body>
</html>
"""
