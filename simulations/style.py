"""How the page of a report looks: plain CSS, nothing loaded from elsewhere."""

STYLE = """
:root{--ink:#1c2733;--soft:#5b6875;--line:#e1e6eb;--page:#f6f7f9;--card:#fff;color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1160px;margin:auto;padding:24px 20px 56px}
h1{font-size:26px;line-height:1.25;margin:2px 0 6px;overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 10px;overflow-wrap:anywhere} h3{font-size:15px;margin:0 0 8px}
p{margin:0 0 8px}
.brand,.small,small,figcaption,.empty{color:var(--soft);font-size:13px} .lead{overflow-wrap:anywhere}
.note{background:#fff6df;border-left:4px solid #e69f00;padding:8px 12px;margin-top:12px;overflow-wrap:anywhere}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}
.tall{max-height:460px;overflow-y:auto;margin:10px 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child>*{border-bottom:0}
th{font-weight:600} .n{text-align:right} .tall td,.tall th{white-space:nowrap;font-size:13px;padding:4px 7px}
.tall td:last-child:not(.n){white-space:pre-wrap;min-width:240px}
.tall tr:first-child th{position:sticky;top:0;background:var(--card)}
.summary .n{min-width:165px;max-width:340px} .summary span{overflow-wrap:anywhere}
.summary th:first-child{min-width:270px;position:sticky;left:0;background:var(--card)}
small{font-weight:400;margin-left:4px} .fit{width:fit-content;max-width:100%}
th i,h2 i{display:inline-block;width:11px;height:11px;border-radius:50%;margin-right:7px}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px}
figure{margin:0;padding:14px 16px;background:var(--card);border:1px solid var(--line);border-radius:8px;min-width:0}
img{display:block;width:100%;height:auto}
figcaption{margin-top:8px;overflow-wrap:anywhere}
details{margin:8px 0} summary{cursor:pointer;font-weight:600;padding:4px 0} section>h3{margin-top:16px}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;overflow-x:auto;margin:8px 0;
  font-size:13px}
@media(max-width:640px){small{display:block;margin:0}
  .summary .n,.summary th:first-child{min-width:120px;padding:6px 8px}}
@media print{.tall{max-height:none}}
"""
