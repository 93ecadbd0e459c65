//! The nodes of a devnet: a process each, of an operator each.

use std::collections::BTreeMap;

use infera_node::Fault;

use super::children::ChildSpec;
use crate::{
    cli::UpArgs,
    services::{Setting, chat_model},
};

/// One child per node, numbered from 1.
pub fn specs(setting: &Setting<'_>, args: &UpArgs) -> Result<Vec<ChildSpec>, String> {
    let faults = faults(&args.node_faults, usize::from(args.nodes))?;
    let program = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
    let dispatcher = setting.ports.url("dispatcher").replacen("http", "ws", 1);
    (1..=usize::from(args.nodes))
        .map(|number| {
            let name = format!("node-{number}");
            let mut arguments = vec![
                "node".to_owned(),
                "--data".to_owned(),
                setting.layout.node(number).to_string_lossy().into_owned(),
                "--dispatcher".to_owned(),
                dispatcher.clone(),
                "--manifest".to_owned(),
                setting.layout.manifest().to_string_lossy().into_owned(),
                "--model".to_owned(),
                chat_model().to_string_lossy().into_owned(),
                "--class".to_owned(),
                "exact".to_owned(),
            ];
            if let Some(fault) = faults.get(&number) {
                arguments.extend(fault.iter().cloned());
            }
            if let Some(otlp) = setting.otlp {
                arguments.extend(["--otlp".to_owned(), otlp.to_owned()]);
            }
            Ok(ChildSpec {
                log: setting.layout.log(&name),
                pid_file: setting.layout.pid(&name),
                name,
                program: program.clone(),
                args: arguments,
                env: Vec::new(),
            })
        })
        .collect()
}

/// The flags of each node that misbehaves.
fn faults(list: &[String], nodes: usize) -> Result<BTreeMap<usize, Vec<String>>, String> {
    list.iter()
        .map(|entry| {
            let (number, mode) = entry
                .split_once('=')
                .and_then(|(number, mode)| Some((number.parse::<usize>().ok()?, mode)))
                .ok_or_else(|| format!("--node-fault {entry}: expected NUMBER=MODE, as 4=garbage"))?;
            if !(1..=nodes).contains(&number) {
                return Err(format!("--node-fault {entry}: there are nodes 1 to {nodes}"));
            }
            Ok((number, Fault::flags(mode).map_err(|reason| format!("--node-fault {entry}: {reason}"))?))
        })
        .collect()
}
