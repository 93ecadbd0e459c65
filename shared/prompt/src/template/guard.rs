//! A parsed template rewritten so that whatever makes a value larger goes through [`super::ops`].
//!
//! minijinja bounds instructions (fuel) and recursion, not memory: `{% set x = x ~ x %}` doubles a text with two
//! instructions, and constants are folded while compiling. Here every `+`, `~`, `*`, slice, list, map, assignment to a
//! namespace and raw text becomes a call of a function that counts. Their names are no identifiers, so that no template
//! can call or replace them.

use minijinja::machinery::ast::{self, BinOpKind, CallArg, Expr, Spanned, Stmt};
use minijinja::machinery::{Span, Token, WhitespaceConfig, tokenize};
use minijinja::syntax::SyntaxConfig;

pub(super) const ADD: &str = "+";
pub(super) const CONCAT: &str = "~";
pub(super) const REPEAT: &str = "*";
pub(super) const SLICE: &str = "[:]";
pub(super) const LIST: &str = "[]";
pub(super) const MAP: &str = "{}";
pub(super) const ASSIGN: &str = ".=";
pub(super) const RAW: &str = "raw text";

/// Most operators, brackets and keywords in one tag: chains of operators nest in the syntax tree, and everything that
/// walks it uses the stack.
pub(super) const MAX_OPERATORS: usize = 400;
/// Most `elif` in a template: they nest too.
pub(super) const MAX_ELIF: usize = 100;
/// Most items of a list, a map or a call; minijinja panics at 65536 arguments.
pub(super) const MAX_ITEMS: usize = 8192;

pub(super) const WHITESPACE: WhitespaceConfig =
    WhitespaceConfig { keep_trailing_newline: false, lstrip_blocks: true, trim_blocks: true };

type Done<T> = Result<T, String>;

/// Refuses templates whose syntax tree would be too deep to walk.
pub(super) fn check_depth(source: &str) -> Done<()> {
    let (mut operators, mut elifs) = (0, 0);
    for token in tokenize(source, false, SyntaxConfig, WHITESPACE) {
        let (token, span) = token.map_err(|e| e.to_string())?;
        match token {
            Token::VariableStart | Token::BlockStart => operators = 0,
            Token::TemplateData(_) | Token::VariableEnd | Token::BlockEnd => {}
            Token::Str(_) | Token::String(_) | Token::Int(_) | Token::Int128(_) | Token::Float(_) => {}
            Token::Comma | Token::Colon => {}
            Token::Ident("elif") => elifs += 1,
            Token::Ident(name) if !matches!(name, "and" | "or" | "not" | "is" | "in" | "if" | "else") => {}
            _ => operators += 1,
        }
        if operators > MAX_OPERATORS {
            let line = span.start_line;
            return Err(format!("the tag in line {line} has more than {MAX_OPERATORS} operators"));
        }
        if elifs > MAX_ELIF {
            return Err(format!("there are more than {MAX_ELIF} elif"));
        }
    }
    Ok(())
}

fn variable(id: &str, span: Span) -> Expr<'_> {
    Expr::Var(Spanned::new(ast::Var { id }, span))
}

fn constant<'a>(value: impl Into<minijinja::Value>, span: Span) -> Expr<'a> {
    Expr::Const(Spanned::new(ast::Const { value: value.into() }, span))
}

fn call<'a>(name: &'static str, args: Vec<Expr<'a>>, span: Span) -> Spanned<ast::Call<'a>> {
    let args = args.into_iter().map(CallArg::Pos).collect();
    Spanned::new(ast::Call { expr: variable(name, span), args }, span)
}

fn refuse<T>(what: &str, span: Span) -> Done<T> {
    Err(format!("line {}: {what} is not supported in a chat template", span.start_line))
}

fn body<'a>(statements: &[Stmt<'a>]) -> Done<Vec<Stmt<'a>>> {
    statements.iter().map(statement).collect()
}

fn option<'a>(value: Option<&Expr<'a>>) -> Done<Option<Expr<'a>>> {
    value.map(expression).transpose()
}

/// What a loop, a macro or `set` gives a value to.
fn target<'a>(e: &Expr<'a>) -> Done<Expr<'a>> {
    match e {
        Expr::Var(v) => Ok(variable(v.id, v.span())),
        Expr::List(l) => {
            let items = l.items.iter().map(target).collect::<Done<_>>()?;
            Ok(Expr::List(Spanned::new(ast::List { items }, l.span())))
        }
        other => refuse("such an assignment", other.span()),
    }
}

fn set<'a>(s: &Spanned<ast::Set<'a>>) -> Done<Stmt<'a>> {
    let value = expression(&s.expr)?;
    if let Expr::GetAttr(attr) = &s.target {
        let args = vec![expression(&attr.expr)?, constant(attr.name, attr.span()), value];
        let call = call(ASSIGN, args, s.span());
        return Ok(Stmt::Do(Spanned::new(ast::Do { call }, s.span())));
    }
    Ok(Stmt::Set(Spanned::new(ast::Set { target: target(&s.target)?, expr: value }, s.span())))
}

fn macro_of<'a>(m: &Spanned<ast::Macro<'a>>) -> Done<Spanned<ast::Macro<'a>>> {
    let node = ast::Macro {
        name: m.name,
        args: m.args.iter().map(target).collect::<Done<_>>()?,
        defaults: m.defaults.iter().map(expression).collect::<Done<_>>()?,
        body: body(&m.body)?,
    };
    Ok(Spanned::new(node, m.span()))
}

fn for_loop<'a>(l: &Spanned<ast::ForLoop<'a>>) -> Done<Stmt<'a>> {
    if l.recursive {
        return refuse("a recursive loop", l.span());
    }
    let node = ast::ForLoop {
        target: target(&l.target)?,
        iter: expression(&l.iter)?,
        filter_expr: option(l.filter_expr.as_ref())?,
        recursive: false,
        body: body(&l.body)?,
        else_body: body(&l.else_body)?,
    };
    Ok(Stmt::ForLoop(Spanned::new(node, l.span())))
}

/// A guarded copy of `s`.
pub(super) fn statement<'a>(s: &Stmt<'a>) -> Done<Stmt<'a>> {
    Ok(match s {
        Stmt::Template(t) => {
            Stmt::Template(Spanned::new(ast::Template { children: body(&t.children)? }, t.span()))
        }
        Stmt::EmitExpr(e) => {
            Stmt::EmitExpr(Spanned::new(ast::EmitExpr { expr: expression(&e.expr)? }, e.span()))
        }
        Stmt::EmitRaw(r) => {
            let expr = Expr::Call(call(RAW, vec![constant(r.raw, r.span())], r.span()));
            Stmt::EmitExpr(Spanned::new(ast::EmitExpr { expr }, r.span()))
        }
        Stmt::ForLoop(l) => for_loop(l)?,
        Stmt::IfCond(i) => {
            let node = ast::IfCond {
                expr: expression(&i.expr)?,
                true_body: body(&i.true_body)?,
                false_body: body(&i.false_body)?,
            };
            Stmt::IfCond(Spanned::new(node, i.span()))
        }
        Stmt::WithBlock(w) => {
            let pair = |(name, value): &(Expr<'a>, Expr<'a>)| Ok((target(name)?, expression(value)?));
            let assignments = w.assignments.iter().map(pair).collect::<Done<_>>()?;
            Stmt::WithBlock(Spanned::new(ast::WithBlock { assignments, body: body(&w.body)? }, w.span()))
        }
        Stmt::Set(s) => set(s)?,
        Stmt::SetBlock(s) => {
            let node = ast::SetBlock {
                target: target(&s.target)?,
                filter: option(s.filter.as_ref())?,
                body: body(&s.body)?,
            };
            Stmt::SetBlock(Spanned::new(node, s.span()))
        }
        Stmt::FilterBlock(f) => {
            let node = ast::FilterBlock { filter: expression(&f.filter)?, body: body(&f.body)? };
            Stmt::FilterBlock(Spanned::new(node, f.span()))
        }
        Stmt::Macro(m) => Stmt::Macro(macro_of(m)?),
        Stmt::CallBlock(c) => {
            let node = ast::CallBlock { call: call_of(&c.call)?, macro_decl: macro_of(&c.macro_decl)? };
            Stmt::CallBlock(Spanned::new(node, c.span()))
        }
        Stmt::Continue(c) => Stmt::Continue(Spanned::new(ast::Continue, c.span())),
        Stmt::Break(b) => Stmt::Break(Spanned::new(ast::Break, b.span())),
        Stmt::Do(d) => Stmt::Do(Spanned::new(ast::Do { call: call_of(&d.call)? }, d.span())),
        Stmt::AutoEscape(a) => return refuse("autoescape", a.span()),
        Stmt::Block(b) => return refuse("block", b.span()),
        Stmt::Import(i) => return refuse("import", i.span()),
        Stmt::FromImport(i) => return refuse("import", i.span()),
        Stmt::Extends(e) => return refuse("extends", e.span()),
        Stmt::Include(i) => return refuse("include", i.span()),
    })
}

fn at_most(items: usize, span: Span) -> Done<()> {
    if items > MAX_ITEMS { refuse(&format!("a list, map or call of {items} items"), span) } else { Ok(()) }
}

fn arguments<'a>(args: &[CallArg<'a>], span: Span) -> Done<Vec<CallArg<'a>>> {
    at_most(args.len(), span)?;
    args.iter()
        .map(|arg| match arg {
            CallArg::Pos(e) => Ok(CallArg::Pos(expression(e)?)),
            CallArg::Kwarg(name, e) => Ok(CallArg::Kwarg(name, expression(e)?)),
            CallArg::PosSplat(_) | CallArg::KwargSplat(_) => refuse("a starred argument", span),
        })
        .collect()
}

fn call_of<'a>(c: &Spanned<ast::Call<'a>>) -> Done<Spanned<ast::Call<'a>>> {
    let node = ast::Call { expr: expression(&c.expr)?, args: arguments(&c.args, c.span())? };
    Ok(Spanned::new(node, c.span()))
}

fn binary<'a>(b: &Spanned<ast::BinOp<'a>>) -> Done<Expr<'a>> {
    let (left, right, span) = (expression(&b.left)?, expression(&b.right)?, b.span());
    let guarded = match b.op {
        BinOpKind::Add => ADD,
        BinOpKind::Concat => CONCAT,
        BinOpKind::Mul => REPEAT,
        BinOpKind::Pow => return refuse("**", span),
        op => return Ok(Expr::BinOp(Spanned::new(ast::BinOp { op, left, right }, span))),
    };
    Ok(Expr::Call(call(guarded, vec![left, right], span)))
}

fn slice<'a>(s: &Spanned<ast::Slice<'a>>) -> Done<Expr<'a>> {
    let part = |e: Option<&Expr<'a>>| e.map_or_else(|| Ok(constant((), s.span())), expression);
    let args =
        vec![expression(&s.expr)?, part(s.start.as_ref())?, part(s.stop.as_ref())?, part(s.step.as_ref())?];
    Ok(Expr::Call(call(SLICE, args, s.span())))
}

fn map<'a>(m: &Spanned<ast::Map<'a>>) -> Done<Expr<'a>> {
    at_most(m.keys.len(), m.span())?;
    let mut args = Vec::with_capacity(m.keys.len() * 2);
    for (key, value) in m.keys.iter().zip(&m.values) {
        args.push(expression(key)?);
        args.push(expression(value)?);
    }
    Ok(Expr::Call(call(MAP, args, m.span())))
}

fn compare<'a>(c: &Spanned<ast::Compare<'a>>) -> Done<Expr<'a>> {
    let op =
        |o: &ast::CompareOp<'a>| Ok::<_, String>(ast::CompareOp { op: o.op, expr: expression(&o.expr)? });
    let ops = c.ops.iter().map(op).collect::<Done<_>>()?;
    Ok(Expr::Compare(Spanned::new(ast::Compare { expr: expression(&c.expr)?, ops }, c.span())))
}

fn unary<'a>(u: &Spanned<ast::UnaryOp<'a>>) -> Done<Expr<'a>> {
    #[expect(clippy::needless_match, reason = "the operator cannot be copied")]
    let op = match u.op {
        ast::UnaryOpKind::Not => ast::UnaryOpKind::Not,
        ast::UnaryOpKind::Neg => ast::UnaryOpKind::Neg,
    };
    Ok(Expr::UnaryOp(Spanned::new(ast::UnaryOp { op, expr: expression(&u.expr)? }, u.span())))
}

fn expression<'a>(e: &Expr<'a>) -> Done<Expr<'a>> {
    let span = e.span();
    Ok(match e {
        Expr::Var(v) => variable(v.id, span),
        Expr::Const(c) => constant(c.value.clone(), span),
        Expr::Slice(s) => slice(s)?,
        Expr::UnaryOp(u) => unary(u)?,
        Expr::BinOp(b) => binary(b)?,
        Expr::Compare(c) => compare(c)?,
        Expr::IfExpr(i) => {
            let node = ast::IfExpr {
                test_expr: expression(&i.test_expr)?,
                true_expr: expression(&i.true_expr)?,
                false_expr: option(i.false_expr.as_ref())?,
            };
            Expr::IfExpr(Spanned::new(node, span))
        }
        Expr::Filter(f) => {
            let (name, args) = (f.name, arguments(&f.args, span)?);
            Expr::Filter(Spanned::new(ast::Filter { name, expr: option(f.expr.as_ref())?, args }, span))
        }
        Expr::Test(t) => {
            let (name, args) = (t.name, arguments(&t.args, span)?);
            Expr::Test(Spanned::new(ast::Test { name, expr: expression(&t.expr)?, args }, span))
        }
        Expr::GetAttr(a) => {
            Expr::GetAttr(Spanned::new(ast::GetAttr { expr: expression(&a.expr)?, name: a.name }, span))
        }
        Expr::GetItem(i) => {
            let subscript_expr = expression(&i.subscript_expr)?;
            Expr::GetItem(Spanned::new(ast::GetItem { expr: expression(&i.expr)?, subscript_expr }, span))
        }
        Expr::Call(c) => Expr::Call(call_of(c)?),
        Expr::List(l) => {
            at_most(l.items.len(), span)?;
            let items = l.items.iter().map(expression).collect::<Done<_>>()?;
            Expr::Call(call(LIST, items, span))
        }
        Expr::Map(m) => map(m)?,
    })
}
